// The heat map: every word with its two calibrated probabilities, and whether the second expert was skipped for it. The
// layers are switched by classes on <body>, so all answers change at once; one tooltip serves all words; the arrow keys go
// from word to word.

import { element, percent, t } from "./strings.js";

// Tokens without text are bytes of a character that a later token completes: one word of the map for all of them.
// The higher probability counts, since that is the one to look at.
export function mergeTokens(tokens) {
  const groups = [];
  let open = [];
  for (const token of tokens) {
    open.push(token);
    if (token.text) {
      groups.push(joined(open));
      open = [];
    }
  }
  if (open.length && groups.length) groups.push(joined([groups.pop(), ...open]));
  return groups;
}

function joined(tokens) {
  const numbers = (name) => tokens.map((token) => token[name]).filter((value) => typeof value === "number");
  const most = (name) => (numbers(name).length ? Math.max(...numbers(name)) : null);
  const weights = numbers("w");
  return {
    text: tokens.map((token) => token.text).join(""),
    p_dev: most("p_dev"),
    p_div: most("p_div"),
    w: weights.length ? weights.reduce((sum, one) => sum + one, 0) / weights.length : null,
    gated: tokens.every((token) => token.gated === true),
  };
}

// A leaf for render(): the words that a piece of the text lies in, each cut to that piece. Spaces around a word stay
// outside of it, so that a colour never hangs over the end of a line.
export function heatLeaf(groups) {
  const starts = [];
  let length = 0;
  for (const group of groups) {
    starts.push(length);
    length += group.text.length;
  }
  return (from, to) => {
    const nodes = [];
    for (let at = firstAt(starts, from); at < groups.length && starts[at] < to; at += 1) {
      const text = groups[at].text.slice(Math.max(0, from - starts[at]), to - starts[at]);
      const [, before, word, after] = /^(\s*)([^]*?)(\s*)$/.exec(text);
      if (before) nodes.push(document.createTextNode(before));
      if (word) nodes.push(tokenNode(groups[at], word));
      if (after) nodes.push(document.createTextNode(after));
    }
    return nodes;
  };
}

function firstAt(starts, place) {
  let low = 0;
  let high = starts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= place) low = middle + 1;
    else high = middle;
  }
  return Math.max(0, low - 1);
}

const values = new WeakMap();

function tokenNode(group, text) {
  const node = element("span", "token", text);
  node.tabIndex = -1;
  values.set(node, group);
  if (typeof group.p_dev === "number") node.style.setProperty("--dev", group.p_dev);
  if (typeof group.p_div === "number") node.style.setProperty("--div", group.p_div);
  if (group.gated) {
    node.classList.add("gated");
    document.body.classList.add("gates"); // a legend of what never happens here would only be asked about
  }
  return node;
}

// One stop of the Tab key for all words of a text: the first one.
export function openToKeys(text) {
  const first = text.querySelector(".token");
  if (first) first.tabIndex = 0;
}

// The run of words around the one that most likely leaves the facts, never half a word; null where none is above `least`.
export function doubtfulSpan(groups, least = 0.3) {
  const risk = groups.map((group) => group.p_dev ?? 0);
  const top = Math.max(0, ...risk);
  if (top < least || !groups[risk.indexOf(top)].text.trim()) return null;
  const edge = Math.max(least, top / 2);
  let from = risk.indexOf(top);
  let to = from + 1;
  const within = (at) => inWord(groups[at - 1].text, groups[at].text);
  while (from > 0 && (risk[from - 1] >= edge || within(from))) from -= 1;
  while (to < groups.length && (risk[to] >= edge || within(to))) to += 1;
  return { from, to, p_dev: top, text: groups.slice(from, to).map((group) => group.text).join("").trim() };
}

// Whether a word or a number goes on from one text to the next; Chinese has no such borders.
export function inWord(before, after) {
  const letter = /(?!\p{Script=Han})[\p{L}\p{N}]/u;
  return letter.test(before.slice(-1)) && letter.test(after.slice(0, 1));
}

export function watchTokens(root, tip) {
  const show = (node) => fill(tip, node, values.get(node));
  const hide = () => { tip.hidden = true; };
  const token = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);
  const on = () => document.body.classList.contains("heat");
  root.addEventListener("mouseover", (event) => { if (token(event) && on()) show(token(event)); });
  root.addEventListener("mouseout", hide);
  root.addEventListener("focusin", (event) => { if (token(event) && on()) show(token(event)); });
  root.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => {
    if (tip.hidden) return;
    const focused = document.activeElement.closest(".token");
    if (focused) show(focused);
    else hide();
  }, { passive: true });
  root.addEventListener("keydown", (event) => {
    const node = token(event);
    if (!node) return;
    if (event.key === "Escape") hide();
    const to = neighbour(node, event.key);
    if (!to) return;
    event.preventDefault();
    node.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}

function neighbour(node, key) {
  const all = [...node.closest(".text").querySelectorAll(".token")];
  const at = all.indexOf(node);
  return { ArrowRight: all[at + 1], ArrowLeft: all[at - 1], Home: all[0], End: all[all.length - 1] }[key];
}

function fill(tip, node, group) {
  const rows = [
    ["tip_word", group.text.trim() || "␣", ""],
    ["tip_p_dev", percent(group.p_dev), "dev"],
    ["tip_p_div", percent(group.p_div), "div"],
    ["tip_w", percent(group.w), ""],
  ];
  if (group.gated) rows.push(["tip_gated", t("yes"), "gated"]);
  const list = element("dl");
  for (const [name, value, kind] of rows) list.append(element("dt", kind, t(name)), element("dd", "", value));
  tip.replaceChildren(list);
  tip.hidden = false;
  node.setAttribute("aria-describedby", "tip");
  const box = node.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 8}px`;
}
