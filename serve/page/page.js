// The chat page's behaviour: what is kept, what is asked of the server, what is shown.
// Text goes into the page by textContent alone, so nothing in it is ever read as HTML.
"use strict";

const KEPT = "babyllama.1"; // in localStorage
const SLIDERS = {
  temperature: { min: 0, max: 2, step: 0.05, value: 0.8 },
  top_p: { min: 0.05, max: 1, step: 0.05, value: 0.9 },
  repetition_penalty: { min: 1, max: 1.5, step: 0.01, value: 1 },
  max_tokens: { min: 8, max: 512, step: 8, value: 256 },
};
// Of a model that takes pictures; it was taught in Chinese.
const PICTURE_EXAMPLES = ["图片里是什么？", "这是动物还是交通工具？"];
const LARGEST_SIDE = 768; // pixels; larger pictures are made smaller before they are sent
const MOST_BYTES = 300_000;
const EXAMPLES = { zh: ["你好", "你是谁？", "给我讲一个故事。"], en: ["你好", "你是谁？", "你喜欢什么？"] };
const WORDS = {
  zh: {
    skip: "跳到输入框", model: "模型", fresh: "新对话", language: "Switch to English", settings: "设置",
    conversation: "对话", hello: "说点什么吧", hint: "小模型，会犯错。给它资料，它就从资料里找答案。",
    reference: "资料", referenceHint: "让模型据此回答的文字", term: "维基百科词条", lookUp: "查找",
    retrieve: "每次提问自动查找资料", question: "输入消息", send: "发送", stop: "停止", close: "关闭",
    keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止", guard: "遇到重复", off: "不管", end: "结束回答",
    redraw: "换个说法", seed: "随机种子", random: "随机", theme: "外观", auto: "跟随系统", light: "浅色",
    dark: "深色", key: "密钥", keyHint: "服务器要求时填写", export: "导出对话", reset: "恢复默认设置",
    temperature: "温度", top_p: "核采样 top-p", repetition_penalty: "重复惩罚", max_tokens: "最长回答（token）",
    user: "你", assistant: "babyllama", copy: "复制", copied: "已复制", again: "重新回答", edit: "编辑",
    resend: "重新发送", cancel: "取消", retry: "重试", writing: "正在回答", stopped: "已停止",
    length: "到了长度上限", time: "超时，已停止", loop: "开始重复，已停止",
    dropped: (n) => `太长：最早的 ${n} 条消息模型看不到了`, looking: "正在查找…",
    several: "有多个含义，请选择：", near: "没有这个词条，相近的有：", sources: (n) => `资料来源（${n}）`,
    noSources: "没有找到合适的资料", characters: (n) => `${n} 字`, automatic: "自动查找",
    offline: "连不上服务器；请检查它是否还在运行", needKey: "服务器要求密钥；请在设置中填写",
    failed: "出错了", broken: "回答中断了", ready: "回答完成",
    addPicture: "添加图片", removePicture: "移除图片", picture: "图片", needPicture: "这个模型看图回答：请先添加一张图片",
    badPicture: "这个文件不是能打开的图片",
  },
  en: {
    skip: "Skip to the input", model: "Model", fresh: "New chat", language: "切换到中文", settings: "Settings",
    conversation: "Conversation", hello: "Say something", hint: "A small model that makes mistakes. Give it a reference text and it looks for the answer there.",
    reference: "Reference", referenceHint: "Text for the model to answer from", term: "Wikipedia article", lookUp: "Look up",
    retrieve: "Look up a reference for every question", question: "Message", send: "Send", stop: "Stop", close: "Close",
    keys: "Enter sends · Shift+Enter breaks the line · Esc stops", guard: "When it repeats itself", off: "Let it", end: "End the reply",
    redraw: "Say it otherwise", seed: "Random seed", random: "random", theme: "Appearance", auto: "System", light: "Light",
    dark: "Dark", key: "Key", keyHint: "if the server asks", export: "Export", reset: "Default settings",
    temperature: "Temperature", top_p: "top-p", repetition_penalty: "Repetition penalty", max_tokens: "Longest reply (tokens)",
    user: "You", assistant: "babyllama", copy: "Copy", copied: "Copied", again: "Regenerate", edit: "Edit",
    resend: "Send again", cancel: "Cancel", retry: "Retry", writing: "Writing", stopped: "Stopped",
    length: "Reached the length limit", time: "Took too long, stopped", loop: "Began to repeat itself, stopped",
    dropped: (n) => `Too long: the model no longer sees the first ${n} messages`, looking: "Looking…",
    several: "Several meanings, choose one:", near: "No such article; similar ones:", sources: (n) => `Sources (${n})`,
    noSources: "No fitting reference was found", characters: (n) => `${n} characters`, automatic: "automatic",
    offline: "Cannot reach the server; is it still running?", needKey: "The server wants a key; enter it in the settings",
    failed: "Something went wrong", broken: "The reply broke off", ready: "Reply finished",
    addPicture: "Add a picture", removePicture: "Remove the picture", picture: "Picture", needPicture: "This model answers about pictures: add one first",
    badPicture: "This file is no picture that can be opened",
  },
};

const $ = (id) => document.getElementById(id);
const defaults = () => ({
  loop_guard: "off", seed: "",
  ...Object.fromEntries(Object.entries(SLIDERS).map(([name, s]) => [name, s.value])),
});
const state = {
  messages: [], reference: "", retrieve: false, model: "", theme: "auto", key: "", sampling: defaults(),
  language: (navigator.language || "zh").startsWith("zh") ? "zh" : "en",
};
let writing = null; // the AbortController of the reply under way
let editing = -1; // number of the message that is being edited
let models = []; // as the server describes them
let picture = ""; // a data URL, for the next message
const sees = () => Boolean(models.find((model) => model.id === state.model)?.pictures);
const say = (name, ...values) => {
  const found = WORDS[state.language][name];
  return typeof found === "function" ? found(...values) : found;
};

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

function keep() {
  const withoutPictures = (name, value) => (name === "picture" ? undefined : value);
  for (const part of [undefined, withoutPictures]) {
    try {
      return localStorage.setItem(KEPT, JSON.stringify(state, part));
    } catch {
      // A full or forbidden store: the pictures, or all of it, last as long as the page.
    }
  }
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT) || "{}");
    for (const name of Object.keys(state)) if (typeof kept[name] === typeof state[name]) state[name] = kept[name];
    state.sampling = { ...defaults(), ...state.sampling };
    const isMessage = (found) => ["user", "assistant"].includes(found?.role) && typeof found.content === "string";
    state.messages = Array.isArray(state.messages) ? state.messages.filter(isMessage) : [];
  } catch {
    // Damaged: begin anew.
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
  showModel();
  showMessages();
  showReference();
}

function showModel() {
  const examples = sees() ? PICTURE_EXAMPLES : EXAMPLES[state.language];
  $("examples").replaceChildren(...examples.map((text) => button(text, () => ask(text), "")));
  $("add-picture").hidden = !sees();
  setPicture(sees() ? picture : "");
}

function paint() {
  const dark = state.theme === "dark" || (state.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function showMessages() {
  $("welcome").hidden = state.messages.length > 0;
  $("messages").replaceChildren(...state.messages.map(messageItem));
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
  const text = make("p", "text", message.content);
  text.dir = "auto";
  item.append(text);
  if (Array.isArray(message.sources)) item.append(sourcesOf(message.sources));
  const isWriting = writing && number === state.messages.length - 1;
  item.classList.toggle("writing", Boolean(isWriting));
  const notes = [say(message.end) && message.end !== "eos" && message.end !== "stop" ? say(message.end) : ""];
  if (message.dropped) notes.push(say("dropped", message.dropped));
  for (const note of notes.filter(Boolean)) item.append(make("p", "note", note));
  if (!isWriting) item.append(toolsOf(message, number));
  return item;
}

function toolsOf(message, number) {
  const tools = make("div", "tools");
  const copy = button(say("copy"), async () => {
    await copyText(message.content);
    copy.textContent = say("copied");
    setTimeout(() => (copy.textContent = say("copy")), 1500);
  });
  tools.append(copy);
  if (message.role === "user") tools.append(button(say("edit"), () => edit(number)));
  else if (number === state.messages.length - 1) tools.append(button(say("again"), regenerate));
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
    state.messages.length = number;
    editing = -1;
    ask(field.value);
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
  if (writing) return;
  editing = number;
  showMessages();
}

function showReference() {
  const n = [...state.reference.trim()].length;
  $("reference-state").textContent = state.retrieve ? say("automatic") : n ? say("characters", n) : "";
  $("reference").disabled = state.retrieve;
}

function complain(text) {
  $("notice").hidden = !text;
  $("notice").firstElementChild.textContent = text;
  $("retry").hidden = state.messages.at(-1)?.role !== "user";
  if (text) scrollDown(true);
}

function scrollDown(always) {
  const talk = $("talk");
  if (always || talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
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
  return body.error?.message || `${say("failed")} (${response.status})`;
}

function ask(text) {
  if (writing || !(text.trim() || picture)) return;
  if (sees() && !picture && !state.messages.some((message) => message.picture)) {
    complain(say("needPicture"));
    return;
  }
  const message = { role: "user", content: text.trim() ? wellFormed(text) : PICTURE_EXAMPLES[0] };
  if (picture) message.picture = picture;
  state.messages.push(message);
  setPicture("");
  $("question").value = "";
  keep();
  answer();
}

function regenerate() {
  if (writing) return;
  if (state.messages.at(-1)?.role === "assistant") state.messages.pop();
  if (state.messages.length) answer();
}

// A message as OpenAI's interface has it.
function asSent({ role, content, picture: url }) {
  if (!url || !sees()) return { role, content };
  return { role, content: [{ type: "image_url", image_url: { url } }, { type: "text", text: content }] };
}

function requestBody() {
  const { seed, ...sampling } = state.sampling;
  // The model looks at one picture: a new one begins anew, though the page shows what was before.
  const first = sees() ? Math.max(0, state.messages.findLastIndex((message) => message.picture)) : 0;
  const body = {
    messages: state.messages.slice(first).map(asSent),
    stream: true, truncate: true, ...sampling,
  };
  if (state.model) body.model = state.model;
  if (seed !== "") body.seed = Number(seed);
  if (state.retrieve) body.retrieve = true;
  else if (state.reference.trim()) body.reference = state.reference;
  return body;
}

async function answer() {
  const body = JSON.stringify(requestBody());
  const reply = { role: "assistant", content: "" };
  const mine = (writing = new AbortController());
  editing = -1; // else what is typed there would cut off this reply
  state.messages.push(reply);
  complain("");
  setBusy(true);
  showMessages();
  scrollDown(true);
  let fault = "";
  try {
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: mine.signal });
    if (response.ok) fault = await readReply(response, reply);
    else fault = await refusalOf(response);
  } catch {
    if (mine.signal.aborted) reply.end = "stopped";
    else fault = reply.content ? say("broken") : say("offline");
  }
  writing = null;
  if (!reply.content && state.messages.at(-1) === reply) state.messages.pop();
  setBusy(false);
  keep();
  showMessages();
  complain(fault);
  scrollDown();
  $("status").textContent = fault ? "" : `${say("ready")}: ${reply.content}`;
}

async function readReply(response, reply) {
  const text = $("messages").lastElementChild.querySelector(".text");
  let done = false;
  for await (const event of eventsOf(response)) {
    if (event === "[DONE]") done = true;
    if (event.error) return event.error.message;
    if (event.sources) reply.sources = event.sources;
    if (event.dropped_messages) reply.dropped = event.dropped_messages;
    const choice = event.choices?.[0];
    if (!choice) continue;
    if (choice.delta?.content) {
      reply.content += choice.delta.content;
      text.textContent = reply.content;
      scrollDown();
    }
    if (choice.end) reply.end = choice.end;
  }
  return done ? "" : say("broken");
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
  $("fresh").disabled = busy;
  if (busy) $("status").textContent = say("writing");
}

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
    if (found.text) setReference(found.text);
  } catch {
    $("found").textContent = say("offline");
  }
}

function setReference(text) {
  state.reference = wellFormed(text);
  if ($("reference").value !== text) $("reference").value = text;
  showReference();
  keep();
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

function exportText() {
  const parts = state.messages.map((m) => `**${say(m.role)}**\n\n${m.picture ? `[${say("picture")}] ` : ""}${m.content}\n`);
  if (state.reference.trim()) parts.unshift(`**${say("reference")}**\n\n${state.reference}\n`);
  download("babyllama.md", parts.join("\n"), "text/markdown");
}

function exportRows() {
  const messages = state.messages.map(({ role, content }) => ({ role, content }));
  if (state.reference.trim()) messages.unshift({ role: "system", content: state.reference });
  download("babyllama.jsonl", JSON.stringify({ id: "page/1", messages }) + "\n", "application/jsonl");
}

// Settings

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
  for (const name of ["theme", "key", "reference"]) $(name).value = state[name];
  $("retrieve").checked = state.retrieve;
}

async function readSettings() {
  try {
    const response = await fetch("/api/settings", { headers: headers() });
    if (!response.ok) return complain(await refusalOf(response));
    const found = await response.json();
    models = found.models;
    $("model").replaceChildren(...found.models.map((model) => new Option(model.id, model.id)));
    if (!found.models.some((model) => model.id === state.model)) state.model = found.models[0].id;
    $("model").value = state.model;
    $("model").disabled = found.models.length < 2;
    $("max_tokens").max = SLIDERS.max_tokens.max = found.models[0].context;
    state.retrieve &&= Boolean(found.retrieval);
    $("retrieve-line").hidden = !found.retrieval;
    $("term").parentElement.hidden = !found.look_up;
    showSettings();
    showReference();
    showModel();
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
    if (!isEnter(event)) return;
    event.preventDefault();
    ask($("question").value);
  });
  on("stop", "click", () => writing?.abort());
  on("retry", "click", () => !writing && answer());
  on("fresh", "click", () => {
    state.messages = [];
    editing = -1;
    keep();
    complain("");
    showMessages();
    $("question").focus();
  });
  on("language", "click", () => {
    state.language = state.language === "zh" ? "en" : "zh";
    keep();
    translate();
  });
  on("open-settings", "click", () => openSettings($("settings").hidden));
  on("close-settings", "click", () => openSettings(false));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    if (writing) writing.abort();
    else if (!$("settings").hidden) openSettings(false);
  });
  on("model", "change", () => ((state.model = $("model").value), keep(), showModel()));
  on("add-picture", "click", () => $("picture-file").click());
  on("picture-file", "change", async () => {
    await takePicture($("picture-file").files[0]);
    $("picture-file").value = ""; // so that the same file can be chosen again
  });
  on("remove-picture", "click", () => (setPicture(""), $("question").focus()));
  on("question", "paste", (event) => takePicture([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
  on("theme", "change", () => ((state.theme = $("theme").value), keep(), paint()));
  on("key", "change", () => ((state.key = $("key").value.trim()), keep(), complain(""), readSettings()));
  for (const name of ["loop_guard", "seed"]) on(name, "change", () => ((state.sampling[name] = $(name).value), keep()));
  on("reference", "input", () => setReference($("reference").value));
  on("retrieve", "change", () => ((state.retrieve = $("retrieve").checked), keep(), showReference()));
  on("look-up", "click", () => lookUp($("term").value));
  on("term", "keydown", (event) => {
    if (!isEnter(event)) return;
    event.preventDefault();
    lookUp($("term").value);
  });
  on("reset", "click", () => ((state.sampling = defaults()), keep(), showSettings()));
  on("export-text", "click", exportText);
  on("export-rows", "click", exportRows);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

recall();
paint();
makeSliders();
listen();
translate();
showSettings();
readSettings();
scrollDown(true);
$("question").focus();
