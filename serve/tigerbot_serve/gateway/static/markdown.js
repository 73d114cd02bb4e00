// A little Markdown as DOM nodes: bold, code, fenced code, lists, paragraphs. There is no markup that text could become:
// every character reaches the page through `leaf(from, to)`, which makes text nodes, or the heat map's spans.

const ITEM = /^ {0,3}(?:([-*+])|(\d{1,9})[.)])[ \t]+/;
const INLINE = /\*\*(?=\S)([^\n]*?\S)\*\*|`([^`\n]+)`/g;

export function render(text, leaf = plain(text)) {
  const root = document.createDocumentFragment();
  const lines = linesOf(text);
  for (let at = 0; at < lines.length; ) {
    const line = lines[at].text;
    if (line.startsWith("```")) at = code(root, lines, at, leaf);
    else if (ITEM.test(line)) at = list(root, lines, at, text, leaf);
    else if (!line.trim()) at += 1;
    else at = paragraph(root, lines, at, text, leaf);
  }
  return root;
}

export function plain(text) {
  return (from, to) => [document.createTextNode(text.slice(from, to))];
}

function linesOf(text) {
  let from = 0;
  return text.split("\n").map((line) => {
    const found = { text: line, from, to: from + line.length };
    from = found.to + 1;
    return found;
  });
}

function code(root, lines, at, leaf) {
  let end = at + 1;
  while (end < lines.length && !lines[end].text.startsWith("```")) end += 1;
  const pre = document.createElement("pre");
  const node = document.createElement("code");
  if (end > at + 1) node.append(...leaf(lines[at + 1].from, lines[end - 1].to));
  pre.append(node);
  root.append(pre);
  return end + 1;
}

function list(root, lines, at, text, leaf) {
  const [, bullet, number] = ITEM.exec(lines[at].text);
  const node = document.createElement(bullet ? "ul" : "ol");
  if (number && number !== "1") node.start = Number(number);
  for (; at < lines.length; at += 1) {
    const found = ITEM.exec(lines[at].text);
    if (!found || Boolean(found[1]) !== Boolean(bullet)) break;
    const item = document.createElement("li");
    inline(item, lines[at].from + found[0].length, lines[at].to, text, leaf);
    node.append(item);
  }
  root.append(node);
  return at;
}

function paragraph(root, lines, at, text, leaf) {
  const from = lines[at].from;
  let to = from;
  for (; at < lines.length; at += 1) {
    const line = lines[at].text;
    if (!line.trim() || line.startsWith("```") || ITEM.test(line)) break;
    to = lines[at].to;
  }
  const node = document.createElement("p");
  inline(node, from, to, text, leaf);
  root.append(node);
  return at;
}

function inline(node, from, to, text, leaf) {
  let at = from;
  for (const found of text.slice(from, to).matchAll(INLINE)) {
    const [whole, bold, mono] = found;
    const begin = from + found.index;
    const mark = bold === undefined ? 1 : 2;
    const inner = document.createElement(bold === undefined ? "code" : "strong");
    if (begin > at) node.append(...leaf(at, begin));
    inner.append(...leaf(begin + mark, begin + mark + (bold ?? mono).length));
    node.append(inner);
    at = begin + whole.length;
  }
  if (to > at) node.append(...leaf(at, to));
}
