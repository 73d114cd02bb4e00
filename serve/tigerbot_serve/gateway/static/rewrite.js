// Why an answer was changed, or is doubted: the difference from its draft, the words that raised the doubt, the reasons
// and the evidence where the server gives them.

import { diff } from "./diff.js";
import { doubtfulSpan, heatLeaf, mergeTokens, openToKeys } from "./heat.js";
import { element, percent, worded } from "./strings.js";

// A button that opens the explanation and goes to the words in question; null where there is nothing to explain.
export function whyOf(ensemble, text) {
  const rewritten = ensemble.verdict === "rewritten" && typeof ensemble.draft === "string";
  if (!rewritten && ensemble.verdict !== "flagged") return null;
  const told = rewritten ? ensemble.draft_tokens : ensemble.tokens;
  const groups = mergeTokens(told || []);
  const span = doubtfulSpan(groups);
  const root = element("div", "why");
  const button = worded("button", "quiet", rewritten ? "why_rewritten" : "why_flagged");
  const panel = element("div", "because");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  panel.hidden = true;
  if (rewritten) panel.append(worded("h3", "", "changes"), changes(ensemble.draft, text));
  if (span) panel.append(worded("h3", "", rewritten ? "draft_doubt" : "doubt"), marked(groups, span));
  panel.append(...reasons(ensemble.reasons, span), ...evidence(ensemble.evidence));
  button.addEventListener("click", () => {
    panel.hidden = !panel.hidden;
    button.setAttribute("aria-expanded", String(!panel.hidden));
    if (!panel.hidden) panel.querySelector(".flagged")?.focus();
  });
  root.append(button, panel);
  return root;
}

function changes(before, after) {
  const line = element("p", "diff");
  for (const { kind, text } of diff(before, after)) {
    if (kind === "same") {
      line.append(text);
      continue;
    }
    const node = element(kind === "removed" ? "del" : "ins");
    node.append(worded("span", "hidden", kind), text);
    line.append(node);
  }
  return line;
}

// The draft (or the answer) with the doubtful words marked; the mark can take the focus.
function marked(groups, span) {
  const leaf = heatLeaf(groups);
  const textOf = (from, to) => groups.slice(from, to).map((group) => group.text).join("");
  const begin = textOf(0, span.from).length + textOf(span.from, span.to).search(/\S/);
  const end = begin + span.text.length;
  const mark = element("mark", "flagged");
  mark.tabIndex = -1;
  mark.append(...leaf(begin, end));
  const line = element("p", "text");
  line.append(...leaf(0, begin), mark, ...leaf(end, textOf(0).length));
  openToKeys(line);
  return line;
}

function reasons(told, span) {
  const lines = (Array.isArray(told) ? told : []).map((one) => (typeof one === "string" ? one : one?.text)).filter(Boolean);
  const items = lines.map((line) => element("li", "", line));
  if (!items.length && span) items.push(worded("li", "", "reason_span", { text: span.text, percent: percent(span.p_dev) }));
  return section("reasons", items);
}

function evidence(told) {
  return section("evidence", (Array.isArray(told) ? told : []).map((one) => {
    const item = element("li");
    const url = webAddress(one?.url);
    const title = one?.title || one?.source || one?.url || "";
    if (url) {
      const link = element("a", "", title);
      Object.assign(link, { href: url, rel: "noopener nofollow noreferrer", target: "_blank" });
      item.append(link);
    } else if (title) item.append(element("b", "", title));
    const text = typeof one === "string" ? one : one?.text || one?.snippet;
    if (text) item.append(element("span", "quote", text));
    return item;
  }));
}

function section(name, items) {
  if (!items.length) return [];
  const list = element("ul");
  list.append(...items);
  return [worded("h3", name, name), list];
}

// Only addresses of the web become links: evidence is text that others wrote.
function webAddress(text) {
  if (typeof text !== "string" || !URL.canParse(text)) return null;
  const url = new URL(text);
  return ["http:", "https:"].includes(url.protocol) ? url.href : null;
}
