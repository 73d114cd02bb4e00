// What changed between two texts, by words; Chinese and Japanese by characters. Longest common subsequence, exact.

const ALONE = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}"; // scripts without spaces between words
const PIECE = new RegExp(`[${ALONE}]|(?:(?![${ALONE}])[\\p{L}\\p{N}\\p{M}_'’-])+|\\s+|[^]`, "gu");
const MOST = 4_000_000; // cells of the table; longer texts are shown as replaced

export function diff(before, after) {
  const left = before.match(PIECE) || [];
  const right = after.match(PIECE) || [];
  if (left.length * right.length > MOST) return merged([["removed", before], ["added", after]]);
  return merged(walk(left, right, table(left, right)));
}

function table(left, right) {
  const width = right.length + 1;
  const longest = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] = left[i] === right[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  return longest;
}

function walk(left, right, longest) {
  const width = right.length + 1;
  const steps = [];
  let i = 0;
  let j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) {
      steps.push(["same", left[i]]);
      i += 1;
      j += 1;
    } else if (j === right.length || (i < left.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      steps.push(["removed", left[i]]);
      i += 1;
    } else {
      steps.push(["added", right[j]]);
      j += 1;
    }
  }
  return steps;
}

// Neighbours of one kind are one step; between two equal words what was removed stands before what was added, and a
// lone space between two changes is part of both, so that a changed phrase reads as a phrase.
function merged(steps) {
  const found = [];
  let removed = "";
  let added = "";
  const flush = () => {
    if (removed) found.push({ kind: "removed", text: removed });
    if (added) found.push({ kind: "added", text: added });
    removed = added = "";
  };
  steps.forEach(([kind, text], at) => {
    if (kind === "removed") removed += text;
    else if (kind === "added") added += text;
    else if (!text.trim() && removed && added && steps[at + 1] && steps[at + 1][0] !== "same") {
      removed += text;
      added += text;
    } else {
      flush();
      const last = found[found.length - 1];
      if (last && last.kind === "same") last.text += text;
      else found.push({ kind: "same", text });
    }
  });
  flush();
  return found;
}
