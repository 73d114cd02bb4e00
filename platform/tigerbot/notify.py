"""A webhook that hears when a run ends: done, stopped or failed. Its address is a secret, so it stands in the environment.

`TIGER_WEBHOOK` is an http(s) address. Feishu/Lark, DingTalk and WeCom robots get their own message shape, everybody else
JSON with `text` (which Slack shows) and the same facts as fields. A webhook that is down never stops a run: it is tried
twice, within seconds, and then said once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any, Literal
from urllib.parse import urlsplit

from tigerbot.spec import Spec

ADDRESS = "TIGER_WEBHOOK"
TIMEOUT_S = 5.0
ATTEMPTS = 2
Happening = Literal["done", "stopped", "failed", "rollback", "budget spent"]


def notify(event: Happening, spec: Spec, detail: str = "") -> bool:
    """Tell the webhook; whether it heard. Without an address nothing happens."""
    address = os.environ.get(ADDRESS, "")
    if not address:
        return False
    facts = {"event": event, "run": spec.name, "kind": spec.kind, "host": socket.gethostname(), "detail": detail[:1000]}
    problem = _post(address, _message(address, facts))
    if problem:
        # The address itself may hold a token: only its host is shown.
        print(f"  the webhook at {urlsplit(address).hostname} did not take {event!r} ({problem})", file=sys.stderr)
    return not problem


def _post(address: str, message: dict[str, Any]) -> str:
    """What went wrong, or nothing."""
    import httpx

    if urlsplit(address).scheme not in ("http", "https"):
        return f"{ADDRESS} wants an http(s) address"
    problem = ""
    for attempt in range(ATTEMPTS):
        try:
            answer = httpx.post(address, json=message, timeout=TIMEOUT_S)
            if answer.is_success:
                return ""
            problem = f"HTTP {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = type(error).__name__
        time.sleep(1.0 if attempt + 1 < ATTEMPTS else 0)
    return problem


def _message(address: str, facts: dict[str, str]) -> dict[str, Any]:
    text = f"{facts['kind']} {facts['run']}: {facts['event']}" + (f" ({facts['detail']})" if facts["detail"] else "")
    host = urlsplit(address).hostname or ""
    if host.endswith(("feishu.cn", "larksuite.com")):
        return {"msg_type": "text", "content": {"text": text}}
    if host.endswith(("dingtalk.com", "weixin.qq.com")):
        return {"msgtype": "text", "text": {"content": text}}
    return {"text": text} | facts
