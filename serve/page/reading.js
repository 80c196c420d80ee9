// Text out of files: plain text and Word documents here, PDF by the server.
"use strict";

const reading = (() => {
  const MOST_FILE = 20 * 2 ** 20; // bytes
  const MOST_TEXT = 20_000_000; // bytes of a document's text; more is a bomb

  class Unreadable extends Error {}

  // raises: Unreadable with the name of the reason (words.js)
  async function textOf(file, askServer) {
    if (file.size > MOST_FILE) throw new Unreadable("fileTooLarge");
    const data = new Uint8Array(await file.arrayBuffer());
    const begins = (...bytes) => bytes.every((byte, i) => data[i] === byte);
    let text = "";
    if (begins(0x25, 0x50, 0x44, 0x46)) text = await askServer(file);
    else if (begins(0x50, 0x4b, 3, 4)) text = await wordText(data);
    else if (begins(0xd0, 0xcf, 0x11, 0xe0)) throw new Unreadable("oldWord");
    else text = plainText(data);
    text = text.replace(/\r\n?/g, "\n").replace(/\n{3,}/g, "\n\n").trim();
    if (!text) throw new Unreadable("noText");
    return text;
  }

  function plainText(data) {
    if ((data[0] === 0xff && data[1] === 0xfe) || (data[0] === 0xfe && data[1] === 0xff)) {
      return new TextDecoder(data[0] === 0xff ? "utf-16le" : "utf-16be").decode(data);
    }
    if (data.includes(0)) throw new Unreadable("noDocument");
    for (const encoding of ["utf-8", "gb18030"]) {
      try {
        return new TextDecoder(encoding, { fatal: true }).decode(data);
      } catch {
        // Another encoding, or no text.
      }
    }
    throw new Unreadable("noDocument");
  }

  // The paragraphs of a .docx: word/document.xml of a ZIP archive (ECMA-376, part 1, 17.3).
  async function wordText(data) {
    const xml = await zipped(data, "word/document.xml");
    if (!xml) throw new Unreadable("noDocument");
    const page = new DOMParser().parseFromString(new TextDecoder().decode(xml), "application/xml");
    if (page.querySelector("parsererror")) throw new Unreadable("noDocument");
    const said = { t: (e) => e.textContent, tab: () => "\t", br: () => "\n", cr: () => "\n" };
    return [...page.getElementsByTagNameNS("*", "p")]
      .map((paragraph) => [...paragraph.getElementsByTagNameNS("*", "*")].map((e) => said[e.localName]?.(e) ?? "").join(""))
      .join("\n");
  }

  // One file of a ZIP archive, found by the directory at its end (PKWARE APPNOTE 4.3).
  async function zipped(data, name) {
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    let end = data.length - 22;
    while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
    if (end < 0) return null;
    try {
      let at = view.getUint32(end + 16, true);
      for (let left = view.getUint16(end + 10, true); left > 0; left--) {
        const [nameSize, extra, note] = [28, 30, 32].map((offset) => view.getUint16(at + offset, true));
        if (new TextDecoder().decode(data.subarray(at + 46, at + 46 + nameSize)) === name) {
          const head = view.getUint32(at + 42, true);
          const start = head + 30 + view.getUint16(head + 26, true) + view.getUint16(head + 28, true);
          const packed = data.subarray(start, start + view.getUint32(at + 20, true));
          return view.getUint16(at + 10, true) === 0 ? packed : await inflated(packed);
        }
        at += 46 + nameSize + extra + note;
      }
    } catch (error) {
      if (error instanceof Unreadable) throw error;
      throw new Unreadable("noDocument"); // cut off or damaged
    }
    return null;
  }

  async function inflated(packed) {
    const reader = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
    const parts = [];
    for (let size = 0; ; ) {
      const { value, done } = await reader.read();
      if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
      size += value.length;
      if (size > MOST_TEXT) throw new Unreadable("fileTooLarge");
      parts.push(value);
    }
  }

  return { textOf, Unreadable };
})();
