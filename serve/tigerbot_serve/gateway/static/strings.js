// The page's words in two languages. Elements name theirs: data-t (text), data-label (aria-label), data-hint (placeholder).

const LANGUAGES = ["en", "zh"];
const tables = {};
let current = "en";

export async function loadStrings() {
  await Promise.all(LANGUAGES.map(async (name) => {
    tables[name] = await (await fetch(`static/strings.${name}.json`)).json();
  }));
  const kept = localStorage.getItem("tiger.language");
  current = LANGUAGES.includes(kept) ? kept : (navigator.language || "en").startsWith("zh") ? "zh" : "en";
}

export function otherLanguage() {
  current = current === "en" ? "zh" : "en";
  localStorage.setItem("tiger.language", current);
}

export function t(name, values = {}) {
  return tables[current][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function known(name) {
  return Object.hasOwn(tables[current], name);
}

export function speak(root = document) {
  document.documentElement.lang = current === "zh" ? "zh-Hans" : "en";
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t, valuesOf(node));
  for (const node of root.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of root.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
}

// An element whose words change with the language: made once, spoken again by speak().
export function worded(kind, className, name, values = {}) {
  const node = element(kind, className, t(name, values));
  node.dataset.t = name;
  if (Object.keys(values).length) node.dataset.values = JSON.stringify(values);
  return node;
}

export function element(kind, className = "", text = undefined) {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function percent(share) {
  return typeof share === "number" ? `${Math.round(100 * share)}%` : "–";
}

function valuesOf(node) {
  return node.dataset.values ? JSON.parse(node.dataset.values) : {};
}
