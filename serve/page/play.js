// The page's logic: images wait, a question is asked of one or two servers, their answers stream in.
// All text from servers and files becomes text nodes, never markup; Markdown becomes elements made one by one.

import { blocks } from "./markdown.js";

const at = (id) => document.getElementById(id);
const SAMPLE_QUESTION = "List the labels and values of the bars.";
// What servers decode as it is. Everything else that the browser can show is sent as PNG.
const SENT_AS_IS = new Set(["image/png", "image/jpeg", "image/webp"]);
// Tokens left free beside images, text and answer: marks of turns, and what rounding adds.
const SPARE_TOKENS = 64;
const KEY = "qvl-key";
const EARLIER = "qvl-questions";
const MOST_EARLIER = 30;

const limits = await (await fetch("play/settings.json")).json();
const sides = [side("v1/", "this server"), ...(limits.beside ? [side("play/beside/v1/", "second server")] : [])];
let turns = []; // {question, images: [{url, pixels}], answers: [{text, tokens}]}, an answer for each side
let waiting = []; // {file, name, width, height, thumbnail}: images of the next question
let running = null; // the AbortController of the question under way
let startedAt = 0;

function side(base, role) {
  return { base, role, models: [], model: null, length: null, problem: null, status: null };
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const say = (text) => { at("status").textContent = text; };

function complain(text, field = null) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
  if (field) {
    const folded = field.closest("details");
    if (folded) folded.open = true;
    field.focus();
  }
}

// ---- servers --------------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(base, path, options = {}) {
  const headers = { ...options.headers };
  const key = at("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(base + path, { ...options, headers, redirect: "error", credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/[^\x20-\x7e]/.test(key)) throw new Refusal(0, "The API key holds characters that no key has.");
    throw new Refusal(0, "The server can't be reached.");
  }
  if (response.ok) return response;
  let message = "";
  try {
    const body = await response.json();
    message = (body.error ?? body).message ?? "";
  } catch { /* no JSON: the status has to do */ }
  message = String(message || `The server answers with status ${response.status}.`);
  const wait = Number(response.headers.get("retry-after"));
  if (response.status === 401) message += key ? " Is the API key under Settings right?" : " Enter the API key under Settings.";
  if (wait > 0 && (response.status === 429 || response.status === 503)) message += ` Try again in ${Math.ceil(wait)} s.`;
  throw new Refusal(response.status, message);
}

async function load(server) {
  Object.assign(server, side(server.base, server.role));
  try {
    const listed = await (await request(server.base, "models")).json();
    server.models = listed.data;
    server.model = listed.data[0].id;
    server.length = listed.data[0].max_model_len ?? null;
  } catch (error) {
    server.problem = error instanceof Refusal ? error.message : "It lists no model.";
    server.status = error.status ?? null;
  }
}

async function loadAll() {
  const locked = limits.key && !at("key").value.trim();
  if (locked) {
    for (const server of sides) Object.assign(server, { problem: "Enter the API key under Settings.", status: 401 });
    at("settings").open = true;
  } else {
    await Promise.all(sides.map(load));
  }
  at("sides").replaceChildren(...(locked ? [make("li", { className: "plain" }, sides[0].problem)] : sides.map(named)));
  at("choices").replaceChildren(...sides.flatMap((server, index) => server.models.length > 1 ? [choice(server, index)] : []));
  showImages();
}

function named(server, index) {
  const text = server.model ?? `${capital(server.role)}: ${server.problem}`;
  return make("li", { className: index ? "second" : "first" }, make("span", {}, text));
}

function choice(server, index) {
  const select = make("select", { id: `model-${index}` }, ...server.models.map((model) => make("option", {}, model.id)));
  select.addEventListener("change", () => {
    const model = server.models[select.selectedIndex];
    Object.assign(server, { model: model.id, length: model.max_model_len ?? server.length });
    at("sides").children[index].firstChild.textContent = model.id;
  });
  return make("p", { className: "field" }, make("label", { htmlFor: select.id }, `Model of ${server.role}`), select);
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

// ---- images -------------------------------------------------------------------------------------------------

const sent = () => turns.flatMap((turn) => turn.images);

// Pixels that each waiting image may have: what the servers take, and what their models have room for.
function pixelBudget() {
  const texts = at("question").value.length + at("system").value.length;
  const used = Math.max(0, ...turns.at(-1)?.answers.map((answer) => answer.tokens) ?? []);
  const room = Math.min(...sides.map((server) => server.length ?? Infinity));
  const tokens = (room - used - Number(at("max-tokens").value) - texts / 2 - SPARE_TOKENS) / waiting.length;
  const shared = (limits.request_pixels - sent().reduce((sum, image) => sum + image.pixels, 0)) / waiting.length;
  return Math.floor(Math.min(limits.image_pixels, shared, tokens * limits.token_pixels * 0.95));
}

function scaled(image, budget) {
  const scale = Math.min(1, Math.sqrt(Math.max(1, budget) / (image.width * image.height)));
  return [Math.max(1, Math.floor(image.width * scale)), Math.max(1, Math.floor(image.height * scale))];
}

function sizes(image, [width, height]) {
  const original = `${image.width} × ${image.height}`;
  return width === image.width && height === image.height ? original : `${original}, scaled to ${width} × ${height}`;
}

async function add(files) {
  complain("");
  for (const file of files) {
    if (sent().length + waiting.length >= limits.images) {
      complain(`The server takes ${limits.images} images in one conversation.`);
      break;
    }
    try {
      const bitmap = await createImageBitmap(file);
      const { width, height } = bitmap;
      bitmap.close();
      waiting.push({ file, name: file.name || "Pasted image", width, height, thumbnail: URL.createObjectURL(file) });
    } catch {
      complain(`${file.name || "What was pasted"} is not an image that this browser can read.`);
    }
  }
  showImages();
}

function card(image, caption, ...more) {
  return make("li", {}, make("img", { src: image.thumbnail, alt: "" }),
    make("span", { className: "name" }, image.name), make("span", { className: "soft" }, caption), ...more);
}

function showImages() {
  const budget = pixelBudget();
  at("images").replaceChildren(...waiting.map((image, index) => {
    const remove = make("button", { type: "button", title: "Remove" }, "×");
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.addEventListener("click", () => {
      waiting.splice(index, 1);
      URL.revokeObjectURL(image.thumbnail);
      showImages();
      (at("images").querySelectorAll("button")[index] ?? at("choose")).focus();
      say(`Removed ${image.name}.`);
    });
    return card(image, sizes(image, scaled(image, budget)), remove);
  }));
  at("choose").textContent = waiting.length ? "Add images" : "Choose images";
  document.body.classList.toggle("filled", waiting.length > 0);
  document.body.classList.toggle("asked", at("turns").children.length > 0);
}

const blobOf = (canvas, type) => new Promise((done) => { canvas.toBlob(done, type, 0.9); });

function dataURL(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function encode(image, budget) {
  let [width, height] = scaled(image, budget);
  let blob = image.file;
  if (width !== image.width || height !== image.height || !SENT_AS_IS.has(blob.type) || blob.size > limits.image_bytes) {
    const bitmap = await createImageBitmap(image.file);
    let type = /jpeg|webp/.test(image.file.type) ? "image/jpeg" : "image/png";
    for (;;) {
      const canvas = make("canvas", { width, height });
      const context = canvas.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(bitmap, 0, 0, width, height);
      blob = await blobOf(canvas, type);
      if (blob && blob.size <= limits.image_bytes) break;
      if (type === "image/png") type = "image/jpeg";
      else [width, height] = [Math.ceil(width * 0.8), Math.ceil(height * 0.8)];
    }
    bitmap.close();
  }
  return { ...image, url: await dataURL(blob), pixels: width * height, caption: sizes(image, [width, height]) };
}

// ---- questions ------------------------------------------------------------------------------------------------

function messages(turn, index) {
  const said = at("system").value.trim() ? [{ role: "system", content: at("system").value.trim() }] : [];
  for (const past of [...turns, turn]) {
    const images = past.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
    const answer = past.answers[index]?.text;
    if (past !== turn && !answer) continue;
    said.push({ role: "user", content: [...images, { type: "text", text: past.question }] });
    if (past !== turn) said.push({ role: "assistant", content: answer });
  }
  return said;
}

// Server-sent events, one JSON each (https://html.spec.whatwg.org/multipage/server-sent-events.html).
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function stream(server, body, signal, show) {
  const answer = { text: "", first: null, total: null, usage: null, ended: null, problem: null, status: null };
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  try {
    const response = await request(server.base, "chat/completions", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Refusal(0, `The server failed: ${event.error.message ?? "it does not say why"}`);
      answer.usage = event.usage ?? answer.usage;
      for (const { delta, finish_reason: reason } of event.choices ?? []) {
        if (delta?.content) {
          answer.first ??= passed();
          answer.text += delta.content;
          show(delta.content);
        }
        answer.ended = reason ?? answer.ended;
      }
    }
    if (!answer.ended) answer.problem = "The answer broke off.";
  } catch (error) {
    if (signal.aborted) answer.problem = "Stopped.";
    else answer.problem = error instanceof Refusal ? error.message : "The answer broke off.";
    answer.status = error.status ?? null;
  }
  answer.total = passed();
  return answer;
}

const seconds = (value) => value < 0.9995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;

function figures({ first, total, usage }) {
  const written = usage?.completion_tokens;
  const speed = written > 1 && total > first ? `${((written - 1) / (total - first)).toFixed(1)}` : "–";
  const rows = [
    ["First token", "the wait for it", first === null ? "–" : seconds(first), ""],
    ["Speed", "from then on", speed, speed === "–" ? "" : " tokens/s"],
    ["Total", "from asking to the end", seconds(total), ""],
    ["Tokens", "written (and read)", written ?? "–", usage ? ` (${usage.prompt_tokens})` : ""],
  ];
  return make("dl", { className: "figures" }, ...rows.map(([term, meaning, value, unit]) => make("div", {},
    make("dt", {}, term, make("small", {}, meaning)), make("dd", {}, String(value), make("span", {}, unit)))));
}

// Return a function that takes the next piece of an answer; what came is drawn once a frame.
function drawing(place) {
  let all = "";
  let due = false;
  return (piece) => {
    all += piece;
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      if (place.isConnected && place.parentElement.hasAttribute("aria-busy")) place.replaceChildren(...blocks(all));
    });
  };
}

function copying(text, server) {
  const button = make("button", { type: "button", className: "quiet copy" }, "Copy");
  button.setAttribute("aria-label", `Copy the answer of ${server.model}`);
  button.addEventListener("click", async () => {
    const done = await copied(text);
    button.textContent = done ? "Copied" : "Copying is off here";
    say(done ? "Copied." : "This browser does not let the page copy.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { /* not a secure page, or not allowed: the old way */ }
  const field = make("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

async function answerOf(turn, index, place, signal) {
  const server = sides[index];
  if (!server.model) await load(server);
  if (!server.model) return { text: "", problem: server.problem, status: server.status };
  const text = make("div", { className: "text" });
  place.append(text);
  place.setAttribute("aria-busy", "true");
  const body = {
    model: server.model,
    messages: messages(turn, index),
    max_tokens: Number(at("max-tokens").value),
    temperature: Number(at("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const written = drawing(text);
  const answer = await stream(server, body, signal, written);
  text.replaceChildren(...blocks(answer.text));
  place.removeAttribute("aria-busy");
  if (!answer.text) text.remove();
  else place.firstChild.append(copying(answer.text, server));
  if (answer.ended === "length") answer.note = "Ended at the longest answer allowed. Raise it under Settings.";
  if (answer.first !== null) place.append(figures(answer));
  return answer;
}

function show(turn) {
  const places = sides.map((server, index) => make("div", { className: index ? "answer second" : "answer", role: "group" },
    make("h3", {}, server.model ?? capital(server.role))));
  places.forEach((place, index) => place.setAttribute("aria-label", `Answer of ${sides[index].model ?? sides[index].role}`));
  const asked = make("div", { className: "question" }, make("h2", {}, turn.question));
  if (turn.images.length) {
    const images = make("ul", { className: "images" }, ...turn.images.map((image) => card(image, image.caption)));
    images.setAttribute("aria-label", "Images");
    asked.append(images);
  }
  const article = make("article", { className: "turn" }, asked, make("div", { className: "answers" }, ...places));
  at("turns").append(article);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  article.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
  return [article, places];
}

function unusable(question) {
  const number = (id) => (at(id).value.trim() === "" ? NaN : Number(at(id).value));
  const longest = number("max-tokens");
  if (!question) return ["Write a question first.", at("question")];
  if (!Number.isInteger(longest) || longest < 1 || longest > limits.max_tokens) {
    return [`The longest answer is a whole number from 1 to ${limits.max_tokens}.`, at("max-tokens")];
  }
  if (!(number("temperature") >= 0 && number("temperature") <= 2)) {
    return ["The temperature is a number from 0 to 2.", at("temperature")];
  }
  if (waiting.length && pixelBudget() < limits.token_pixels) {
    return ["The model has no room left for images: start a new conversation, or shorten the longest answer.", at("question")];
  }
  return null;
}

async function ask() {
  const question = at("question").value.trim();
  const fault = unusable(question);
  complain(...(fault ?? [""]));
  if (fault) return;
  const controller = new AbortController();
  running = controller;
  startedAt = performance.now();
  at("go").textContent = "Stop";
  at("go").classList.add("stop");
  say("Asking.");
  const asked = waiting;
  try {
    const budget = pixelBudget();
    const turn = { question, images: await Promise.all(asked.map((image) => encode(image, budget))), answers: [] };
    waiting = [];
    at("question").value = "";
    at("fresh").hidden = false;
    const [article, places] = show(turn);
    showImages();
    const answers = [];
    const one = async (index) => {
      const answer = await answerOf(turn, index, places[index], controller.signal);
      if (answer.problem) places[index].append(make("p", { className: "failed" }, answer.problem));
      if (answer.note) places[index].append(make("p", { className: "soft small" }, answer.note));
      answers[index] = answer;
    };
    if (at("in-turn").checked) for (const index of sides.keys()) await one(index);
    else await Promise.all(sides.map((_, index) => one(index)));
    if (running !== controller) return; // a new conversation was begun meanwhile
    conclude(turn, answers, article, asked);
  } catch (error) {
    if (running === controller) complain(`The page failed: ${error.message}`);
    throw error;
  } finally {
    if (running === controller) {
      running = null;
      at("go").textContent = "Ask";
      at("go").classList.remove("stop");
    }
  }
}

function conclude(turn, answers, article, asked) {
  turn.answers = answers.map(({ text, usage }) => ({ text, tokens: usage?.total_tokens ?? 0 }));
  let verdict = "";
  if (answers.length === 2 && answers.every((answer) => answer.ended && !answer.problem)) {
    verdict = answers[0].text === answers[1].text ? "Both answers are the same." : "The answers differ.";
    article.append(make("p", { className: "verdict" }, verdict));
  }
  const heard = answers.map((answer, index) => `${sides[index].model ?? capital(sides[index].role)}: ${answer.text} ${answer.problem ?? ""}`);
  say([...heard, verdict].join(" ").trim());
  if (answers.some((answer) => answer.text)) {
    turns.push(turn);
    remember(turn.question);
  } else if (!answers.some((answer) => answer.problem === "Stopped.") || !at("question").value) {
    // nothing was answered: the question waits to be asked again
    if (!at("question").value) at("question").value = turn.question;
    waiting = [...asked, ...waiting];
    showImages();
    if (answers.some((answer) => answer.status === 401)) complain("", at("key"));
  }
}

// ---- earlier questions -----------------------------------------------------------------------------------------

const earlier = () => JSON.parse(sessionStorage.getItem(EARLIER) ?? "[]");
let recalled = -1; // which earlier question the field shows, the latest being 0

function remember(question) {
  const all = [question, ...earlier().filter((each) => each !== question)].slice(0, MOST_EARLIER);
  sessionStorage.setItem(EARLIER, JSON.stringify(all));
  showEarlier();
}

function showEarlier() {
  recalled = -1;
  const all = earlier();
  at("earlier").hidden = !all.length;
  at("questions").replaceChildren(...all.map((question) => {
    const button = make("button", { type: "button", className: "quiet" }, question);
    button.addEventListener("click", () => {
      at("question").value = question;
      at("question").focus();
    });
    return make("li", {}, button);
  }));
}

// Up and Down go through the earlier questions while the field holds none of one's own.
function recall(step) {
  const all = earlier();
  const shown = recalled < 0 ? "" : all[recalled];
  if (at("question").value !== shown) return false;
  const next = Math.max(-1, Math.min(all.length - 1, recalled + step));
  if (next === recalled) return false;
  recalled = next;
  at("question").value = next < 0 ? "" : all[next];
  return true;
}

// ---- what the user does ---------------------------------------------------------------------------------------

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask();
  else if (performance.now() - startedAt > 500) running.abort(); // not the second half of a double click
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    if (!event.shiftKey && recall(event.key === "ArrowUp" ? 1 : -1)) event.preventDefault();
    return;
  }
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) ask();
});
at("choose").addEventListener("click", () => at("file").click());
for (const id of ["file", "photo"]) {
  at(id).addEventListener("change", async () => {
    const files = [...at(id).files];
    at(id).value = "";
    await add(files);
  });
}
at("camera").addEventListener("click", () => at("photo").click());
at("camera").hidden = !matchMedia("(pointer: coarse)").matches;
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(EARLIER);
  showEarlier();
  at("question").focus();
  say("Forgotten.");
});
for (const details of document.querySelectorAll("details")) {
  const shut = () => {
    details.open = false;
    details.querySelector("summary").focus();
  };
  details.querySelector(".close")?.addEventListener("click", shut);
  details.addEventListener("keydown", (event) => { if (event.key === "Escape" && details.open) shut(); });
}
at("sample").addEventListener("click", async () => {
  const image = await (await fetch("play/sample.png")).blob();
  await add([new File([image], "Sample chart", { type: "image/png" })]);
  if (!at("question").value.trim()) at("question").value = SAMPLE_QUESTION;
  at("question").focus();
});
at("fresh").addEventListener("click", () => {
  running?.abort();
  running = null;
  at("go").textContent = "Ask";
  at("go").classList.remove("stop");
  for (const image of [...sent(), ...waiting]) URL.revokeObjectURL(image.thumbnail);
  turns = [];
  waiting = [];
  at("turns").replaceChildren();
  at("fresh").hidden = true;
  complain("");
  showImages();
  at("question").focus();
  say("New conversation.");
});
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value.trim());
  loadAll();
});
for (const id of ["max-tokens", "question", "system"]) at(id).addEventListener("change", showImages);
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  add(files);
});
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!holdsFiles(event)) return;
  event.preventDefault();
  add([...event.dataTransfer.files]);
});

at("key").value = sessionStorage.getItem(KEY) ?? "";
at("max-tokens").value = Math.min(256, limits.max_tokens);
at("max-tokens").max = limits.max_tokens;
at("order-field").hidden = sides.length < 2;
showEarlier();
await loadAll();
