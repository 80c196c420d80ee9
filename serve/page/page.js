// The chat page's behaviour: what is shown, what is asked of the server, what becomes of the answer.
// Text goes into the page by textContent, or through markdown.js.
"use strict";

const KEPT = "babyllama.1"; // settings, in localStorage
const DRAFT = "babyllama.draft."; // what is typed and not sent, by conversation
const SLIDERS = {
  temperature: { min: 0, max: 2, step: 0.05, value: 0.5 },
  top_p: { min: 0.05, max: 1, step: 0.05, value: 0.9 },
  repetition_penalty: { min: 1, max: 1.5, step: 0.01, value: 1 },
  max_tokens: { min: 8, max: 512, step: 8, value: 256 },
};
const CHOICES = { loop_guard: ["off", "end", "redraw"], theme: ["auto", "light", "dark"] };
const MODES = ["title", "chat", "continue"]; // of a model's tasks, those with an input of their own
// Of a model that takes pictures; it was taught in Chinese.
const PICTURE_EXAMPLES = ["图片里是什么？", "这是动物还是交通工具？"];
const EXAMPLES = {
  title: ["针对移动机器人在未知环境中的路径规划问题，提出了一种基于改进蚁群算法的路径规划方法。该方法在信息素更新中引入距离因子，加快了收敛速度。仿真结果表明，改进蚁群算法能有效地为移动机器人规划出较优的路径。"],
  chat: ["你好", "你是谁？", "你喜欢什么？"],
  continue: ["从前有座山，", "今天天气很好，"],
};
const LARGEST_SIDE = 768; // pixels; larger pictures are made smaller before they are sent
const MOST_BYTES = 300_000;
const MOST_SENT = { messages: 400, characters: 24_000 }; // of a conversation; the server takes a little more
const N_TITLES = 3;
const UNDO_MS = 8000;

const $ = (id) => document.getElementById(id);
const defaults = () => ({
  loop_guard: "redraw", seed: "",
  ...Object.fromEntries(Object.entries(SLIDERS).map(([name, s]) => [name, s.value])),
});
const state = {
  model: "", theme: "auto", key: "", sampling: defaults(), list: true,
  language: (navigator.language || "zh").startsWith("zh") ? "zh" : "en",
};
let talk = store.blank(); // the conversation on the screen
let writing = null; // the AbortController of the reply under way
let editing = -1; // number of the message that is being edited
let models = []; // as the server describes them
let server = {}; // what else it offers
let picture = ""; // a data URL, for the next message
let saving = Promise.resolve(); // the last save that was begun

const model = () => models.find((found) => found.id === state.model) ?? { tasks: ["chat"] };
const sees = () => Boolean(model().pictures);
const can = (task) => model().tasks.includes(task);
const modes = () => MODES.filter(can).sort((a, b) => model().tasks.indexOf(a) - model().tasks.indexOf(b));
const mode = () => (modes().includes(talk.mode) ? talk.mode : (modes()[0] ?? "chat"));
const inMode = (name) => name + mode()[0].toUpperCase() + mode().slice(1);
const say = (name, ...values) => filled(WORDS[state.language][name], values);
const filled = (found, values) => (typeof found === "function" ? found(...values) : found);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, action, className = "quiet") {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

// What is kept between visits

// localStorage may be full, forbidden or damaged: then all of it lasts as long as the page.
function local(action, name, value) {
  try {
    return localStorage[action](name, value);
  } catch {
    return null;
  }
}

const keep = () => local("setItem", KEPT, JSON.stringify(state));
const draft = (id, text) => (text ? local("setItem", DRAFT + id, text) : local("removeItem", DRAFT + id));

// What was kept, as far as it can be what it says it is; and a conversation of an older page.
function recall() {
  let kept = {};
  try {
    kept = JSON.parse(local("getItem", KEPT)) ?? {};
  } catch {
    // Damaged: begin anew.
  }
  const isOne = (name, value) => (CHOICES[name] ?? Object.keys(WORDS)).includes(value);
  if (isOne("theme", kept.theme)) state.theme = kept.theme;
  if (isOne("language", kept.language)) state.language = kept.language;
  if (typeof kept.model === "string") state.model = kept.model;
  if (typeof kept.list === "boolean") state.list = kept.list;
  state.key = asKey(kept.key);
  for (const [name, slider] of Object.entries(SLIDERS)) {
    const value = kept.sampling?.[name];
    if (typeof value === "number" && value >= slider.min) state.sampling[name] = value;
  }
  if (isOne("loop_guard", kept.sampling?.loop_guard)) state.sampling.loop_guard = kept.sampling.loop_guard;
  if (/^\d*$/.test(kept.sampling?.seed ?? "?")) state.sampling.seed = String(kept.sampling.seed);
  return Array.isArray(kept.messages) && kept.messages.length ? store.clean({ ...store.blank(), ...kept }) : null;
}

// A header takes no other characters.
const asKey = (text) => (typeof text === "string" ? text.replace(/[^\x21-\x7e]/g, "") : "");

// Writes the conversation down. Where another tab has changed it since, this becomes a copy.
function save() {
  if (!talk.messages.length && !talk.version && !talk.reference && !talk.system) return saving;
  talk.changed = Date.now();
  const mine = talk;
  saving = saving.then(async () => {
    try {
      const version = await store.put(mine);
      if (version) mine.version = version;
      else await fork(mine);
    } catch {
      toast(say("notKept"));
    }
    await showList();
  });
  return saving;
}

async function fork(mine) {
  const { id, created } = store.blank();
  Object.assign(mine, { id, created, title: say("copyOf", titleOf(mine)), version: 0 });
  mine.version = await store.put(mine);
  if (mine === talk) remember();
  toast(say("forked"));
}

// Which conversation this tab shows, for a reload.
function remember() {
  try {
    sessionStorage.setItem(KEPT, talk.id);
  } catch {
    // Then a reload begins a new one.
  }
}

async function firstTalk(older) {
  if (older) {
    local("setItem", KEPT, JSON.stringify(state));
    return older;
  }
  let id = null;
  try {
    id = sessionStorage.getItem(KEPT);
    return (id && (await store.get(id))) || { ...store.blank(), ...(id && { id }) };
  } catch {
    return store.blank();
  }
}

// Conversations

const titleOf = (found) => found.title || firstWords(found) || say("untitled");
const firstWords = (found) => (found.messages.find((m) => m.role === "user")?.content ?? "").replace(/\s+/g, " ").trim().slice(0, 28);

async function openTalk(found) {
  if (writing) return;
  talk = found;
  editing = -1;
  remember();
  setPicture("");
  complain("");
  $("question").value = local("getItem", DRAFT + talk.id) ?? "";
  $("found").textContent = "";
  $("choices").replaceChildren();
  $("reference-box").open = false;
  showTalk();
  scrollDown(true);
  await showList();
}

async function freshTalk() {
  await openTalk({ ...store.blank(), mode: talk.mode });
  if (narrow()) openList(false);
  $("question").focus();
}

let listing = 0; // only the list that was asked for last is shown: an older look-up may end after a newer one
async function showList() {
  const turn = ++listing;
  const wanted = $("search").value.trim().toLowerCase();
  const rows = [];
  try {
    await store.each((found) => {
      const said = [titleOf(found), found.reference, ...found.messages.map((m) => m.content)];
      if (wanted && !said.some((text) => text.toLowerCase().includes(wanted))) return;
      rows.push({ id: found.id, title: titleOf(found), changed: found.changed });
    });
  } catch {
    return;
  }
  if (turn !== listing) return;
  rows.sort((a, b) => b.changed - a.changed);
  $("talks").replaceChildren(...rows.map(talkItem));
  $("no-talks").hidden = rows.length > 0;
  $("no-talks").textContent = say(wanted ? "nothingFound" : "noTalks");
}

function talkItem({ id, title, changed }) {
  const item = make("li", id === talk.id ? "here" : "");
  const open = button(title, async () => {
    const found = await store.get(id);
    if (!found) return showList();
    await openTalk(found);
    if (narrow()) openList(false);
  }, "name");
  open.dir = "auto";
  if (id === talk.id) open.setAttribute("aria-current", "true");
  open.title = `${title}\n${new Date(changed).toLocaleString(document.documentElement.lang)}`;
  const rename = named(button("✎", () => item.replaceChildren(renamer(id, title))), `${say("rename")}: ${title}`);
  const remove = named(button("×", () => removeTalk(id)), `${say("remove")}: ${title}`);
  item.append(open, rename, remove);
  return item;
}

function named(element, name) {
  element.setAttribute("aria-label", name);
  element.title = name;
  return element;
}

function renamer(id, title) {
  const field = make("input");
  field.value = title;
  field.maxLength = 100;
  named(field, say("rename"));
  const done = async (isMeant) => {
    field.onblur = null;
    if (isMeant && field.value.trim()) await changeTitle(id, field.value.trim());
    await showList();
  };
  field.onblur = () => done(true);
  field.addEventListener("keydown", (event) => {
    if (isEnter(event)) done(true);
    if (event.key === "Escape") done(false);
    if (isEnter(event) || event.key === "Escape") event.preventDefault();
  });
  setTimeout(() => field.select());
  return field;
}

async function changeTitle(id, title) {
  if (id === talk.id) {
    talk.title = title;
    return save();
  }
  const found = await store.get(id);
  if (found) await store.put({ ...found, title });
}

async function removeTalk(id) {
  if (writing && id === talk.id) writing.abort();
  await saving;
  const found = await store.get(id);
  if (!found) return showList();
  await store.remove(id);
  const wasHere = id === talk.id;
  if (wasHere) {
    while (writing) await new Promise((resolve) => setTimeout(resolve, 20));
    await store.remove(id); // the reply that was stopped has saved itself
    await freshTalk();
  }
  await showList();
  toast(`${say("removed")}: ${titleOf(found)}`, async () => {
    await store.put({ ...found, version: 0 });
    if (wasHere) await openTalk(await store.get(id));
    await showList();
  });
}

let toastTimer = 0;
function toast(text, undo) {
  clearTimeout(toastTimer);
  const [line, back] = $("toast").children;
  line.textContent = text;
  back.hidden = !undo;
  back.onclick = () => {
    $("toast").hidden = true;
    undo();
  };
  $("toast").hidden = false;
  toastTimer = setTimeout(() => ($("toast").hidden = true), UNDO_MS);
}

const smallScreen = matchMedia("(max-width: 62rem)");
const narrow = () => smallScreen.matches;

function openList(open) {
  document.documentElement.dataset.list = open ? "open" : "closed";
  $("open-list").setAttribute("aria-expanded", String(open));
  if (narrow()) return;
  state.list = open;
  keep();
}

// Another tab has changed something.
async function othersChanged(id) {
  await showList();
  if (id !== talk.id || writing || editing >= 0) return;
  await saving;
  const found = await store.get(id);
  if (found && found.version > talk.version && id === talk.id && !writing) {
    talk = found;
    showTalk();
  }
}

// Showing

function translate() {
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const e of document.querySelectorAll("[data-say]")) e.textContent = say(e.dataset.say);
  for (const e of document.querySelectorAll("[data-name]")) {
    e.setAttribute("aria-label", say(e.dataset.name));
    if (e.tagName === "BUTTON") e.title = say(e.dataset.name);
  }
  for (const e of document.querySelectorAll("[data-hint]")) e.placeholder = say(e.dataset.hint);
  $("language").textContent = state.language === "zh" ? "EN" : "中文";
  for (const e of document.querySelectorAll(".slider")) e.querySelector("span").textContent = say(e.dataset.slider);
  for (const line of document.querySelectorAll("[data-export]")) {
    for (const e of line.querySelectorAll("button")) named(e, `${line.firstElementChild.textContent} ${e.textContent}`);
  }
  showTalk();
  showList();
}

function showTalk() {
  $("reference").value = talk.reference;
  $("system").value = talk.system;
  $("retrieve").checked = talk.retrieve;
  showModes();
  showReference();
  showMessages();
}

function showModes() {
  const isChat = mode() === "chat";
  $("modes").hidden = modes().length < 2;
  $("modes").replaceChildren(...modes().map((name) => {
    const choice = button(say(name), () => setMode(name), "");
    choice.setAttribute("aria-pressed", String(name === mode()));
    choice.dataset.mode = name;
    return choice;
  }));
  $("question").placeholder = say(inMode("question"));
  $("question").classList.toggle("tall", mode() === "title");
  $("reference-box").hidden = !(isChat && can("reference"));
  $("add-picture").hidden = !sees();
  $("system").parentElement.hidden = !can("chat");
  setPicture(sees() ? picture : "");
  const [hello, hint] = $("welcome").children;
  hello.textContent = say(inMode("hello"));
  hint.textContent = say(inMode("hint")) + (isChat && can("reference") ? (state.language === "zh" ? "" : " ") + say("hintReference") : "");
  const examples = sees() ? PICTURE_EXAMPLES : EXAMPLES[mode()];
  $("examples").replaceChildren(...examples.map((text) => button(text, () => ask(text), "")));
}

function setMode(name) {
  talk.mode = name;
  showModes();
  showReference();
  $("question").focus();
}

function paint() {
  const dark = state.theme === "dark" || (state.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function showMessages() {
  $("welcome").hidden = talk.messages.length > 0;
  $("messages").replaceChildren(...talk.messages.map(messageItem));
}

function messageItem(message, number) {
  const item = make("li", message.role);
  item.append(make("span", message.role === "user" ? "unseen" : "who", say(message.role)));
  if (number === editing) {
    item.append(editor(message, number));
    return item;
  }
  if (isPicture(message.picture)) {
    const image = make("img");
    image.src = message.picture;
    image.alt = say("picture");
    item.append(image);
  }
  const isWriting = Boolean(writing) && number === talk.messages.length - 1;
  item.classList.toggle("writing", isWriting);
  item.append(Array.isArray(message.titles) ? titlesOf(message.titles) : textOf(message));
  if (Array.isArray(message.sources)) item.append(sourcesOf(message.sources));
  for (const note of notesOf(message)) item.append(make("p", "note", note));
  if (!isWriting) item.append(toolsOf(message, number));
  return item;
}

function textOf(message) {
  const text = make("div", "text");
  text.dir = "auto";
  if (message.role === "user") text.textContent = message.content;
  else markdown.show(text, message.content, codeCopier);
  return text;
}

const codeCopier = (code) => copier(code, "copy");

function titlesOf(titles) {
  const list = make("ol", "titles");
  list.append(...titles.map((title) => {
    const line = make("li");
    line.append(make("span", "text", title), copier(title));
    return line;
  }));
  return list;
}

function notesOf(message) {
  const found = [];
  const words = WORDS[state.language];
  if (["length", "time", "loop", "stopped"].includes(message.end)) found.push(words[message.end]);
  if (message.read) found.push(words.read(...message.read));
  if (message.dropped) found.push(words.dropped(message.dropped));
  const figures = [message.speed && words.speed(message.speed), message.context && words.context(...message.context)];
  if (figures.some(Boolean)) found.push(figures.filter(Boolean).join(" · "));
  return found;
}

function copier(text, className = "quiet", name = "copy") {
  const copy = button(say(name), async () => {
    await copyText(text);
    copy.textContent = say("copied");
    setTimeout(() => (copy.textContent = say(name)), 1500);
  }, className);
  return copy;
}

function toolsOf(message, number) {
  const tools = make("div", "tools");
  const copy = message.titles ? copier(message.titles.join("\n"), "quiet", "copyAll") : copier(message.content);
  tools.append(copy);
  if (message.role === "user") tools.append(button(say("edit"), () => edit(number)));
  else if (number === talk.messages.length - 1 && message.task !== "title") tools.append(button(say("again"), regenerate));
  for (const e of tools.children) e.disabled = Boolean(writing) && e !== copy;
  return tools;
}

function sourcesOf(sources) {
  if (!sources.length) return make("p", "note", say("noSources"));
  const box = make("details", "sources");
  box.append(make("summary", "", say("sources", sources.length)));
  for (const source of sources) box.append(make("p", "", `${source.citation}\n${source.text}`));
  return box;
}

function editor(message, number) {
  const box = make("div", "editing");
  const field = make("textarea");
  field.value = message.content;
  field.rows = Math.min(8, message.content.split("\n").length + 1);
  field.setAttribute("aria-label", say("edit"));
  const line = make("div", "");
  const send = () => {
    if (!field.value.trim()) return;
    picture ||= message.picture ?? "";
    talk.messages.length = number;
    editing = -1;
    ask(field.value, message.task);
  };
  const leave = () => {
    editing = -1;
    showMessages();
    $("question").focus();
  };
  line.append(button(say("cancel"), leave, ""), " ", button(say("resend"), send, ""));
  field.addEventListener("keydown", (event) => {
    if (isEnter(event)) send();
    if (event.key === "Escape") leave();
    if (isEnter(event) || event.key === "Escape") event.preventDefault();
  });
  box.append(field, line);
  setTimeout(() => field.focus());
  return box;
}

function edit(number) {
  if (writing || number < 0) return;
  editing = number;
  showMessages();
  $("messages").children[number].scrollIntoView({ block: "nearest" });
}

function showReference() {
  const n = [...talk.reference.trim()].length;
  const isSet = talk.retrieve || n > 0;
  const name = talk.source ? `${talk.source} · ` : "";
  $("reference-state").textContent = talk.retrieve ? say("automatic") : n ? name + say("characters", n) : "";
  $("reference-box").classList.toggle("chip", isSet);
  $("clear-reference").hidden = !isSet;
  $("reference").disabled = talk.retrieve;
  $("system-chip").hidden = !(talk.system.trim() && mode() === "chat");
  $("system-chip").textContent = `${say("system")} · ${say("characters", [...talk.system.trim()].length)}`;
}

function complain(text) {
  $("notice").hidden = !text;
  $("notice").firstElementChild.textContent = text;
  $("retry").hidden = talk.messages.at(-1)?.role !== "user";
  if (text) scrollDown(true);
}

const fromEnd = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight;

function scrollDown(always) {
  if (always || fromEnd() < 120) $("talk").scrollTop = $("talk").scrollHeight;
}

// Asking

// Half a character, which a broken input method may leave, cannot be sent.
const wellFormed = (text) => (text.toWellFormed ? text.toWellFormed() : text);
const headers = () => ({ "Content-Type": "application/json", ...(state.key ? { Authorization: `Bearer ${state.key}` } : {}) });

async function refusalOf(response) {
  if (response.status === 401) {
    openSettings(true);
    return say("needKey");
  }
  const body = await response.json().catch(() => ({}));
  return faultText(body.error ?? {}, response.status);
}

// What went wrong, in the page's language: as the server says it, or by its code.
function faultText({ message = "", code = "", param = "" }, status = "") {
  const isOurs = /[\u4e00-\u9fff]/.test(message.replace(/[“'"].*?[”'"]/g, "")) === (state.language === "zh");
  const known = WORDS[state.language].faults[code];
  if (known && !(isOurs && state.language === "zh")) {
    const quoted = /['“](.*?)['”]/.exec(message)?.[1] ?? "";
    const values = { invalid_value: [param ? `${param} (${message})` : message], nothing_found: [quoted] };
    return filled(known, values[code] ?? message.match(/\d+/g) ?? []);
  }
  return message ? (isOurs ? message : `${say("failed", status)} ${message}`) : say("failed", status);
}

function ask(text, task = mode()) {
  if (writing || !(text.trim() || picture)) return;
  if (sees() && !picture && !talk.messages.some((message) => message.picture)) {
    complain(say("needPicture"));
    return;
  }
  const message = { role: "user", content: text.trim() ? wellFormed(text) : PICTURE_EXAMPLES[0] };
  if (task !== "chat") message.task = task;
  if (picture) message.picture = picture;
  talk.mode = task;
  talk.messages.push(message);
  setPicture("");
  $("question").value = "";
  draft(talk.id, "");
  save();
  answer();
}

function regenerate() {
  if (writing) return;
  if (talk.messages.at(-1)?.role === "assistant") talk.messages.pop();
  if (talk.messages.length) answer();
}

// A message as OpenAI's interface has it.
function asSent({ role, content, picture: url }) {
  if (!url || !sees()) return { role, content };
  return { role, content: [{ type: "image_url", image_url: { url } }, { type: "text", text: content }] };
}

// Where a request goes and what it says. Titles and continuations stand alone; a conversation is sent
// without them, and without what would be too much for the server anyway.
function requestOf() {
  const last = talk.messages.at(-1);
  const common = { stream: true, ...(state.model && { model: state.model }) };
  const { seed, ...chosen } = state.sampling;
  const sampling = { ...chosen, ...(seed !== "" && { seed: Number(seed) }), stream_options: { include_usage: true } };
  if (last.task === "title") {
    return ["/v1/chat/completions", { ...common, task: "title", n: N_TITLES, messages: [asSent(last)] }];
  }
  if (last.task === "continue") return ["/v1/completions", { ...common, ...sampling, prompt: last.content }];
  // The model looks at one picture: a new one begins anew, though the page shows what was before.
  const first = sees() ? Math.max(0, talk.messages.findLastIndex((message) => message.picture)) : 0;
  const messages = recent(talk.messages.slice(first).filter((m) => !m.task)).map(asSent);
  const body = { ...common, ...sampling, messages, truncate: true };
  const system = [talk.system, talk.retrieve || !can("reference") ? "" : talk.reference].map((text) => text.trim()).filter(Boolean).join("\n");
  if (talk.retrieve && can("reference")) body.retrieve = true;
  else if (system) body.reference = wellFormed(system);
  return ["/v1/chat/completions", body];
}

function recent(messages) {
  let n = messages.length - 1;
  let size = messages[n].content.length;
  while (n > 0 && messages.length - n < MOST_SENT.messages && size + messages[n - 1].content.length <= MOST_SENT.characters) {
    size += messages[--n].content.length;
  }
  return messages.slice(n);
}

async function answer() {
  const [path, body] = requestOf();
  const task = talk.messages.at(-1).task;
  const reply = { role: "assistant", content: "", ...(task && { task }) };
  const mine = (writing = new AbortController());
  const here = talk;
  editing = -1; // else what is typed there would cut off this reply
  here.messages.push(reply);
  complain("");
  setBusy(true);
  showMessages();
  scrollDown(true);
  let fault = "";
  try {
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: mine.signal });
    if (response.ok) fault = await readReply(response, reply);
    else fault = await refusalOf(response);
  } catch {
    if (mine.signal.aborted) reply.end = "stopped";
    else fault = reply.content ? say("broken") : say("offline");
  }
  if (!reply.content && here.messages.at(-1) === reply) here.messages.pop();
  if (task === "title" && !fault && !reply.content && reply.end !== "stopped") fault = say("noTitle");
  await save();
  writing = null;
  setBusy(false);
  showMessages();
  complain(fault);
  scrollDown();
  $("status").textContent = fault ? "" : `${say("ready")}: ${reply.content}`;
}

async function readReply(response, reply) {
  const shown = $("messages").lastElementChild.querySelector(".text");
  const titles = [];
  let done = false;
  let began = 0;
  for await (const event of eventsOf(response)) {
    if (event === "[DONE]") done = true;
    if (event.error) return faultText(event.error);
    if (event.sources) reply.sources = event.sources;
    if (event.dropped_messages) reply.dropped = event.dropped_messages;
    if (event.read && event.read.characters < event.read.of) reply.read = [event.read.characters, event.read.of];
    if (event.usage && !titles.length) figuresOf(event.usage, reply, began);
    const choice = event.choices?.[0];
    if (!choice) continue;
    const text = choice.delta?.content ?? choice.text ?? "";
    if (text) {
      began ||= performance.now();
      if (reply.task === "title") titles[choice.index] = (titles[choice.index] ?? "") + text;
      reply.content = titles[0] ?? reply.content + text;
      if (reply.task !== "title") markdown.show(shown, reply.content, codeCopier);
      scrollDown();
    }
    if (choice.end) reply.end = choice.end;
  }
  if (titles.length) reply.titles = titles.filter(Boolean);
  if (titles.length && talk.messages.length === 2) talk.title ||= titles[0];
  return done ? "" : say("broken");
}

function figuresOf(usage, reply, began) {
  const seconds = (performance.now() - began) / 1000;
  if (began && usage.completion_tokens > 1 && seconds > 0) reply.speed = Math.round(usage.completion_tokens / seconds);
  if (model().context) reply.context = [usage.total_tokens, model().context];
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      yield part === "data: [DONE]" ? "[DONE]" : JSON.parse(part.slice(6));
    }
  }
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("messages").setAttribute("aria-busy", String(busy));
  for (const id of ["fresh", "model"]) $(id).disabled = busy || (id === "model" && models.length < 2);
  if (busy) $("status").textContent = say("writing");
}

// 资料

async function lookUp(term) {
  if (!term.trim()) return;
  $("found").textContent = say("looking");
  $("choices").replaceChildren();
  try {
    const response = await fetch(`/api/wiki?term=${encodeURIComponent(term)}`, { headers: headers() });
    if (!response.ok) {
      $("found").textContent = await refusalOf(response);
      return;
    }
    const found = await response.json();
    $("found").textContent = found.choices ? say(found.ambiguous ? "several" : "near") : [found.citation, found.url].filter(Boolean).join(" · ");
    $("choices").replaceChildren(...(found.choices || []).map((title) => button(title, () => lookUp(title), "")));
    if (found.text) setReference(found.text, found.citation);
  } catch {
    $("found").textContent = say("offline");
  }
}

function setReference(text, source = "") {
  talk.reference = wellFormed(text);
  talk.source = source;
  if ($("reference").value !== text) $("reference").value = text;
  showReference();
  save();
}

// A document becomes the 资料, or what is to get a title.
async function takeDocument(file) {
  $("found").textContent = say("reading");
  let text = "";
  try {
    text = await reading.textOf(file, pdfText);
  } catch (error) {
    $("found").textContent = "";
    if (!(error instanceof reading.Unreadable)) error.message ||= say("noDocument");
    return complain(`${file.name}: ${say(error.message) ?? error.message}`);
  }
  $("found").textContent = file.name;
  complain("");
  if (mode() === "chat" && can("reference")) return setReference(text, file.name);
  $("question").value = text;
  draft(talk.id, text);
  $("question").focus();
}

async function pdfText(file) {
  let response;
  try {
    response = await fetch("/api/text", { method: "POST", headers: { ...headers(), "Content-Type": "application/pdf" }, body: file });
  } catch {
    throw new Error(say("offline"));
  }
  if (!response.ok) throw new Error(await refusalOf(response));
  return (await response.json()).text;
}

function takeFiles(files) {
  const found = [...files];
  const image = sees() && found.find((file) => file.type.startsWith("image/"));
  if (image) takePicture(image);
  else if (found.length) takeDocument(found[0]);
  return found.length > 0;
}

// Pictures

const isPicture = (url) => typeof url === "string" && /^data:image\/(jpeg|png|webp);base64,/.test(url);

function setPicture(url) {
  picture = url;
  $("picture").hidden = !url;
  const image = $("picture").querySelector("img");
  if (url) image.src = url;
  else image.removeAttribute("src");
  image.alt = say("picture");
}

async function takePicture(file) {
  if (!file || !sees()) return;
  try {
    setPicture(await pictureUrl(file));
    complain("");
  } catch {
    complain(say("badPicture"));
  }
  $("question").focus();
}

// Small ones go as they are; others are drawn anew: upright, on white, no larger than the server needs.
async function pictureUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  if (file.size <= MOST_BYTES && /^image\/(jpeg|png|webp)$/.test(file.type)) return dataUrl(file);
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Copy and export

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", "unseen");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

function download(name, text, type) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function exportTalks(scope, kind) {
  let found = [talk];
  if (scope === "all") {
    await saving;
    found = [];
    await store.each((each) => found.push(each));
    found.sort((a, b) => a.created - b.created);
  }
  const date = new Date().toISOString().slice(0, 10);
  const text = { ".md": asMarkdown, ".json": asJson, ".jsonl": asRows }[kind](found);
  download(`babyllama-${date}${kind}`, text, kind === ".md" ? "text/markdown" : "application/json");
}

const dated = (time) => new Date(time).toISOString();

function asMarkdown(talks) {
  const block = (name, text) => `**${name}**\n\n${text}\n`;
  return talks.map((one) => [
    `# ${titleOf(one)}\n\n${say("model")}: ${state.model} · ${dated(one.created)} – ${dated(one.changed)}\n`,
    ...(one.system.trim() ? [block(say("system"), one.system)] : []),
    ...(one.reference.trim() ? [block(say("reference"), one.reference)] : []),
    ...one.messages.map((m) => block(say(m.role), (m.picture ? `[${say("picture")}] ` : "") + (m.titles?.map((t, i) => `${i + 1}. ${t}`).join("\n") ?? m.content))),
  ].join("\n")).join("\n---\n\n");
}

const asJson = (talks) => JSON.stringify({
  model: state.model, exported: dated(Date.now()),
  conversations: talks.map(({ created, changed, version, ...rest }) => ({ ...rest, title: titleOf(rest), created: dated(created), changed: dated(changed) })),
}, null, 1);

// Rows as sft.py reads them: whole turns, the 资料 as the system message.
function asRows(talks) {
  return talks.map((one, number) => {
    const messages = one.messages.map(({ role, content }) => ({ role, content }));
    const system = [one.system, one.reference].filter((text) => text.trim()).join("\n");
    if (system) messages.unshift({ role: "system", content: system });
    return JSON.stringify({ id: `page/${number + 1}`, messages }) + "\n";
  }).join("");
}

// Settings and the model's card

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
  if (open) $("close-settings").focus();
  else $("open-settings").focus();
}

function makeSliders() {
  $("sliders").replaceChildren(...Object.entries(SLIDERS).map(([name, slider]) => {
    const line = make("label", "slider");
    line.dataset.slider = name;
    line.htmlFor = name; // else it would name the number beside it
    const input = make("input");
    Object.assign(input, { type: "range", id: name, min: slider.min, max: slider.max, step: slider.step });
    const output = make("output");
    input.addEventListener("input", () => {
      state.sampling[name] = Number(input.value);
      output.textContent = input.value;
      keep();
    });
    line.append(make("span"), output, input);
    return line;
  }));
}

function showSettings() {
  for (const name of Object.keys(SLIDERS)) {
    $(name).value = state.sampling[name];
    $(name).previousElementSibling.textContent = $(name).value;
  }
  for (const name of ["loop_guard", "seed"]) $(name).value = state.sampling[name];
  for (const name of ["theme", "key"]) $(name).value = state[name];
}

async function readSettings() {
  try {
    const response = await fetch("/api/settings", { headers: headers() });
    if (!response.ok) return complain(await refusalOf(response));
    server = await response.json();
    models = server.models;
    $("model").replaceChildren(...models.map((found) => new Option(found.id, found.id)));
    if (!models.some((found) => found.id === state.model)) state.model = models[0].id;
    $("model").value = state.model;
    $("model").disabled = models.length < 2;
    $("max_tokens").max = SLIDERS.max_tokens.max = models[0].context;
    talk.retrieve &&= Boolean(server.retrieval);
    $("retrieve-line").hidden = !server.retrieval;
    $("term").parentElement.hidden = !server.look_up;
    showSettings();
    showTalk();
  } catch {
    complain(say("offline"));
  }
}

async function openCard() {
  try {
    const response = await fetch(`/api/card?model=${encodeURIComponent(state.model)}`, { headers: headers() });
    if (!response.ok) return complain(await refusalOf(response));
    const { facts, text } = await response.json();
    const words = WORDS[state.language];
    const task = (name) => (name === "reference" ? words.reference_task : words[name]) ?? name;
    const shown = (name, value) => (Array.isArray(value) ? value.map(task).join(" · ") : typeof value === "number" && name !== "step" ? value.toLocaleString() : String(value));
    const lines = Object.entries(facts).filter(([name, value]) => value !== null && words.facts[name]);
    $("facts").replaceChildren(...lines.flatMap(([name, value]) => [make("dt", "", words.facts[name]), make("dd", "", shown(name, value))]));
    markdown.show($("card-text"), text, codeCopier, false);
    $("card").showModal();
  } catch {
    complain(say("offline"));
  }
}

// Enter while an input method is composing chooses a character and sends nothing.
const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function listen() {
  const on = (id, event, action) => $(id).addEventListener(event, action);
  on("ask", "submit", (event) => {
    event.preventDefault();
    ask($("question").value);
  });
  on("question", "keydown", (event) => {
    if (event.key === "ArrowUp" && !$("question").value && !event.isComposing) {
      event.preventDefault();
      edit(talk.messages.findLastIndex((message) => message.role === "user"));
    }
    if (!isEnter(event)) return;
    event.preventDefault();
    ask($("question").value);
  });
  on("question", "input", () => draft(talk.id, $("question").value));
  on("stop", "click", () => writing?.abort());
  on("retry", "click", () => !writing && answer());
  on("fresh", "click", () => freshTalk());
  on("language", "click", () => {
    state.language = state.language === "zh" ? "en" : "zh";
    keep();
    translate();
  });
  on("open-list", "click", () => openList(document.documentElement.dataset.list !== "open"));
  on("search", "input", showList);
  on("open-settings", "click", () => openSettings($("settings").hidden));
  on("close-settings", "click", () => openSettings(false));
  on("open-card", "click", openCard);
  on("close-card", "click", () => $("card").close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || $("card").open) return;
    if (writing) writing.abort();
    else if (!$("settings").hidden) openSettings(false);
    else if (narrow()) openList(false);
  });
  on("model", "change", () => ((state.model = $("model").value), keep(), showTalk()));
  on("talk", "scroll", () => ($("to-end").hidden = fromEnd() < 240));
  on("to-end", "click", () => scrollDown(true));
  on("add-picture", "click", () => $("picture-file").click());
  on("picture-file", "change", async () => {
    await takePicture($("picture-file").files[0]);
    $("picture-file").value = ""; // so that the same file can be chosen again
  });
  on("remove-picture", "click", () => (setPicture(""), $("question").focus()));
  on("open-document", "click", () => $("document").click());
  on("document", "change", async () => {
    await takeDocument($("document").files[0]);
    $("document").value = "";
  });
  for (const id of ["question", "reference"]) {
    on(id, "paste", (event) => takeFiles(event.clipboardData.files) && event.preventDefault());
  }
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    $("drop").firstElementChild.textContent = say(mode() === "title" ? "dropTitle" : "drop");
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || ($("drop").hidden = true));
  document.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!holdsFiles(event)) return;
    event.preventDefault();
    takeFiles(event.dataTransfer.files);
  });
  on("theme", "change", () => ((state.theme = $("theme").value), keep(), paint()));
  on("key", "change", () => ((state.key = asKey($("key").value)), keep(), complain(""), readSettings()));
  for (const name of ["loop_guard", "seed"]) on(name, "change", () => ((state.sampling[name] = $(name).value), keep()));
  on("reference", "input", () => setReference($("reference").value));
  on("clear-reference", "click", (event) => {
    event.preventDefault();
    talk.retrieve = $("retrieve").checked = false;
    setReference("");
  });
  on("retrieve", "change", () => ((talk.retrieve = $("retrieve").checked), save(), showReference()));
  on("system", "input", () => ((talk.system = $("system").value), showReference(), save()));
  on("system-chip", "click", () => (openSettings(true), $("system").focus()));
  on("look-up", "click", () => lookUp($("term").value));
  on("term", "keydown", (event) => {
    if (!isEnter(event)) return;
    event.preventDefault();
    lookUp($("term").value);
  });
  on("reset", "click", () => ((state.sampling = defaults()), keep(), showSettings()));
  for (const line of document.querySelectorAll("[data-export]")) {
    for (const e of line.querySelectorAll("button")) e.addEventListener("click", () => exportTalks(line.dataset.export, e.textContent));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  smallScreen.addEventListener("change", () => openList(!narrow() && state.list));
  store.onChange(othersChanged);
}

async function begin() {
  const older = recall();
  paint();
  makeSliders();
  listen();
  openList(state.list && !narrow());
  showSettings();
  translate();
  const isKept = await store.open();
  await openTalk(await firstTalk(older));
  if (older) save();
  await readSettings();
  if (!isKept) toast(say("notKept"));
  scrollDown(true);
  $("question").focus();
}

begin();
