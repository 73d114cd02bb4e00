// Why an answer was changed, or is doubted: the difference from its draft, the words that raised the doubt, the reasons
// and the evidence where the server gives them. What the server says in English is said in the page's language; what is
// not known here stays as it came.

import { diff } from "./diff.js";
import { doubtfulSpan, heatLeaf, inWord, mergeTokens, openToKeys } from "./heat.js";
import { element, percent, worded } from "./strings.js";

const TOLD = {
  "the rewrite is less doubtful": "reason_better",
  "the rewrite is no better": "reason_no_better",
  "the rewrite says the same": "reason_same",
  "the rewrite left the form or language of the draft": "reason_form",
  "nothing was found": "reason_nothing",
  "the judge failed": "reason_judge",
  "no time was left for a rewrite": "reason_time",
  "there is nothing new to rewrite it with": "reason_no_ground",
};

// A button that opens the explanation and goes to the words in question; null where there is nothing to explain.
export function whyOf(ensemble, text) {
  const rewritten = ensemble.verdict === "rewritten" && typeof ensemble.draft === "string";
  if (!rewritten && ensemble.verdict !== "flagged") return null;
  const told = rewritten ? ensemble.draft_tokens : ensemble.tokens;
  const groups = mergeTokens(told || []);
  const spans = spansOf(groups, rewritten ? ensemble.draft_flagged : ensemble.flagged);
  const root = element("div", "why");
  const button = worded("button", "quiet", rewritten ? "why_rewritten" : "why_flagged");
  const panel = element("div", "because");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  panel.hidden = true;
  if (rewritten) panel.append(worded("h3", "", "changes"), changes(ensemble.draft, text));
  if (spans.length) panel.append(worded("h3", "", rewritten ? "draft_doubt" : "doubt"), marked(groups, spans));
  panel.append(...reasons(ensemble.reasons, spans), ...evidence(ensemble.evidence));
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

// Where the words in doubt stand: as the judge has them, else the run of words that most likely leaves the facts.
function spansOf(groups, told) {
  const text = groups.map((group) => group.text).join("");
  const place = (characters) => [...text].slice(0, characters).join("").length; // the server counts characters
  const judged = (Array.isArray(told) ? told : []).map((one) => ({ ...one, from: place(one.start), to: place(one.end) }));
  const found = judged.filter((one) => one.text?.trim() && text.slice(one.from, one.to) === one.text);
  if (found.length) return whole(text, found.sort((one, other) => one.from - other.from));
  const span = doubtfulSpan(groups);
  if (!span) return [];
  const before = groups.slice(0, span.from).map((group) => group.text).join("").length;
  const from = before + text.slice(before).search(/\S/);
  return [{ from, to: from + span.text.length, text: span.text, p_dev: span.p_dev }];
}

// The same stretches, none of which breaks a word or a number; what then touches is one.
function whole(text, spans) {
  const found = [];
  for (let { from, to, p_dev } of spans) {
    while (from > 0 && inWord(text.slice(0, from), text.slice(from))) from -= 1;
    while (to < text.length && inWord(text.slice(0, to), text.slice(to))) to += 1;
    const last = found[found.length - 1];
    if (last && from <= last.to) Object.assign(last, { to: Math.max(to, last.to), p_dev: Math.max(p_dev, last.p_dev) });
    else found.push({ from, to, p_dev });
  }
  return found.map((one) => ({ ...one, text: text.slice(one.from, one.to) }));
}

// The draft (or the answer) with the doubtful words marked; the marks can take the focus.
function marked(groups, spans) {
  const leaf = heatLeaf(groups);
  const line = element("p", "text");
  let at = 0;
  for (const { from, to } of spans) {
    const mark = element("mark", "flagged");
    mark.tabIndex = -1;
    mark.append(...leaf(from, to));
    line.append(...leaf(at, from), mark);
    at = to;
  }
  line.append(...leaf(at, groups.map((group) => group.text).join("").length));
  openToKeys(line);
  return line;
}

function reasons(told, spans) {
  const items = spans.map(({ text, p_dev }) => worded("li", "", "reason_span", { text, percent: percent(p_dev) }));
  for (const one of Array.isArray(told) ? told : []) {
    const line = typeof one === "string" ? one : one?.text;
    if (line) items.push(Object.hasOwn(TOLD, line) ? worded("li", "", TOLD[line]) : element("li", "", line));
  }
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
