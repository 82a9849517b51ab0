// The Markdown that models write, as elements: headings, lists, tables, quotes, code, emphasis. A subset, read in one
// pass. Everything is made with createElement and text nodes: no HTML of an answer is ever parsed, links and images
// stay as they are written, so an answer can neither run, load nor lead anywhere.

const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+-]*) *$/;
const HEADING = /^ {0,3}#{1,6} +(.+?)(?: +#+)? *$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(?=\S)/;
const BORDER = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const DEEPEST = 8; // lists and quotes in each other; below that lines stay as they are
const LONGEST = 1000; // a longer line is a paragraph's: expressions that try twice stay cheap
const MARKS = ["**", "__", "~~", "*", "_"];
const TAGS = { "**": "strong", "__": "strong", "*": "em", _: "em", "~~": "s" };

function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

/** Return an answer's blocks as elements. */
export function blocks(text) {
  return read(text.split("\n"), 0);
}

function read(lines, depth) {
  const made = [];
  let paragraph = [];
  const close = () => {
    if (paragraph.length) made.push(make("p", ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let at = 0; at < lines.length;) {
    const [element, next] = block(lines, at, depth, paragraph.length > 0);
    if (next > at) {
      close();
      if (element) made.push(element);
      at = next;
    } else {
      paragraph.push(lines[at]);
      at += 1;
    }
  }
  close();
  return made;
}

// The block that begins at a line, and the line after it; the same line where a paragraph begins or goes on.
function block(lines, at, depth, within) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  if (line.length > LONGEST) return [null, at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence[1]);
  const heading = HEADING.exec(line);
  if (heading) return [make("h4", ...inline(heading[1])), at + 1];
  if (RULE.test(line)) return [make("hr"), at + 1];
  if (line.includes("|") && border(lines[at + 1] ?? "")) return table(lines, at);
  if (depth < DEEPEST) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    const item = ITEM.exec(line);
    if (item && !(within && /\d/.test(item[2]) && !item[2].startsWith("1"))) return list(lines, at, depth);
  }
  return [null, at];
}

const border = (line) => line.length <= LONGEST && line.includes("|") && BORDER.test(line);

function code(lines, at, mark) {
  let end = at + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(mark) && !lines[end].trim().replaceAll(mark[0], ""))) end += 1;
  const pre = make("pre", make("code", lines.slice(at + 1, end).join("\n")));
  pre.tabIndex = 0; // long lines are scrolled, by keyboard too
  return [pre, end + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return [make("blockquote", ...read(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), depth + 1)), end];
}

function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const element = make(ordered ? "ol" : "ul");
  if (ordered && parseInt(mark, 10) !== 1) element.start = parseInt(mark, 10);
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== ordered || RULE.test(lines[end])) break;
    const inside = [lines[end].slice(item[0].length)];
    end += 1;
    while (end < lines.length && (deeper(lines[end], indent.length) || (!lines[end].trim() && deeper(lines[end + 1] ?? "", indent.length)))) {
      inside.push(lines[end].slice(Math.min(item[0].length, lines[end].search(/\S|$/))));
      end += 1;
    }
    const parts = read(inside, depth + 1);
    // an item of one paragraph is its text
    element.append(make("li", ...(parts[0]?.tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts)));
    if (end < lines.length - 1 && !lines[end].trim() && ITEM.test(lines[end + 1])) end += 1;
  }
  return [element, end];
}

const deeper = (line, indent) => line.trim() !== "" && line.search(/\S/) > indent;

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const head = cells(lines[at]);
  const row = (line, tag) => {
    const found = cells(line);
    return make("tr", ...head.map((_, column) => make(tag, ...inline(found[column] ?? ""))));
  };
  const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
  const around = make("div", make("table", make("thead", row(lines[at], "th")), make("tbody", ...body)));
  around.className = "table";
  around.tabIndex = 0;
  return [around, end];
}

// Code, emphasis, escapes. Each search for an end that is not there is done once, so this stays linear.
function inline(text, marks = MARKS) {
  const made = [];
  const missing = new Set();
  let plain = "";
  const flush = () => {
    if (plain) made.push(plain);
    plain = "";
  };
  const closing = (mark, from) => {
    if (missing.has(mark)) return -1;
    const found = text.indexOf(mark, from);
    if (found < 0) missing.add(mark);
    return found;
  };
  for (let at = 0; at < text.length;) {
    const next = text[at];
    if (next === "\\" && /[\\`*_{}[\]()#+\-.!|~>]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (next === "`") {
      let run = "";
      while (text[at + run.length] === "`") run += "`";
      const end = closing(run, at + run.length);
      if (end > 0 && text[end + run.length] !== "`") {
        flush();
        made.push(make("code", text.slice(at + run.length, end).replace(/^ (.*) $/s, "$1")));
        at = end + run.length;
      } else {
        plain += run;
        at += run.length;
      }
      continue;
    }
    const mark = marks.find((each) => text.startsWith(each, at));
    const end = mark && opens(text, at, mark) ? closing(mark, at + mark.length + 1) : -1;
    if (mark && end > 0 && closes(text, end, mark)) {
      flush();
      const inner = text.slice(at + mark.length, end);
      made.push(make(TAGS[mark], ...inline(inner, marks.filter((each) => each !== mark))));
      at = end + mark.length;
      continue;
    }
    plain += mark ?? next;
    at += mark?.length ?? 1;
  }
  flush();
  return made;
}

const word = (letter) => /[\p{L}\p{N}]/u.test(letter ?? "");
const opens = (text, at, mark) => /\S/.test(text[at + mark.length] ?? "") && !(mark.includes("_") && word(text[at - 1]));
const closes = (text, at, mark) => /\S/.test(text[at - 1]) && !(mark.includes("_") && word(text[at + mark.length]));
