// Where conversations are kept: IndexedDB, or the page's memory where the browser has none to give.
// Each record has a version; who saves over a newer one is told, so two tabs never lose a word.
"use strict";

const store = (() => {
  let db = null;
  const memory = new Map();
  const channel = typeof BroadcastChannel === "function" ? new BroadcastChannel("babyllama") : null;

  const isText = (value) => typeof value === "string";
  const isMessage = (m) => ["user", "assistant"].includes(m?.role) && isText(m.content);

  // A record as the page expects it, whatever the browser gives back.
  function clean(found) {
    const talk = blank();
    for (const name of Object.keys(talk)) {
      if (typeof found?.[name] === typeof talk[name]) talk[name] = found[name];
    }
    talk.messages = Array.isArray(talk.messages) ? talk.messages.filter(isMessage) : [];
    return talk;
  }

  function blank() {
    const now = Date.now();
    const id = now.toString(36) + Math.random().toString(36).slice(2, 10);
    return {
      id, title: "", messages: [], reference: "", source: "", retrieve: false, system: "", mode: "",
      created: now, changed: now, version: 0,
    };
  }

  function open() {
    return new Promise((resolve) => {
      const inMemory = () => resolve(false);
      try {
        const request = indexedDB.open("babyllama", 1);
        request.onupgradeneeded = () => request.result.createObjectStore("talks", { keyPath: "id" });
        request.onsuccess = () => {
          db = request.result;
          db.onversionchange = () => db.close();
          resolve(true);
        };
        request.onerror = request.onblocked = inMemory;
      } catch {
        inMemory();
      }
    });
  }

  // The result of what `work` asks of the store, once it is on the disk.
  function transact(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = db.transaction("talks", mode);
      const out = {};
      transaction.oncomplete = () => resolve(out.value);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
      work(transaction.objectStore("talks"), out);
    });
  }

  async function get(id) {
    if (!db) return memory.has(id) ? clean(structuredClone(memory.get(id))) : null;
    const found = await transact("readonly", (talks, out) => {
      talks.get(id).onsuccess = (event) => (out.value = event.target.result);
    });
    return found ? clean(found) : null;
  }

  // Saves, and gives the new version; 0 if another tab has saved since, and then nothing is changed.
  async function put(talk) {
    const kept = structuredClone(talk);
    const after = (found) => (found && found.version !== kept.version ? 0 : kept.version + 1);
    let version = 0;
    if (!db) {
      version = after(memory.get(kept.id));
      if (version) memory.set(kept.id, { ...kept, version });
    } else {
      version = await transact("readwrite", (talks, out) => {
        talks.get(kept.id).onsuccess = (event) => {
          out.value = after(event.target.result);
          if (out.value) talks.put({ ...kept, version: out.value });
        };
      });
    }
    if (version) channel?.postMessage(kept.id);
    return version;
  }

  async function remove(id) {
    if (db) await transact("readwrite", (talks) => talks.delete(id));
    else memory.delete(id);
    channel?.postMessage(id);
  }

  // Every conversation, one after the other, so that images do not fill the memory.
  async function each(visit) {
    if (!db) return memory.forEach((found) => visit(clean(found)));
    await transact("readonly", (talks) => {
      talks.openCursor().onsuccess = (event) => {
        const cursor = event.target.result;
        if (!cursor) return;
        visit(clean(cursor.value));
        cursor.continue();
      };
    });
  }

  return { open, blank, clean, get, put, remove, each, onChange: (act) => channel && (channel.onmessage = (event) => act(event.data)) };
})();
