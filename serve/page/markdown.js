// A reply on the screen. Text without Markdown stays exactly as it is; anything else is read by
// marked, and what comes of it goes through DOMPurify. HTML in a reply is shown as text.
"use strict";

const markdown = (() => {
  const ALLOWED = {
    ALLOWED_TAGS: ["p", "br", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "hr", "a",
      "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
    ALLOWED_ATTR: ["href", "start", "align"],
    ALLOWED_URI_REGEXP: /^https?:/i,
    RETURN_DOM_FRAGMENT: true,
  };
  const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const reader = new marked.Marked({
    gfm: true,
    renderer: { html: ({ text }) => escaped(text), image: ({ text, href }) => escaped(text || href) },
  });
  const PLAIN = new Set(["paragraph", "text", "space", "br", "html"]);
  const isPlain = (tokens) => tokens.every((token) => PLAIN.has(token.type) && isPlain(token.tokens ?? []));

  // copyButton: makes the button of a block of code; breaks: whether a line's end is one on the screen
  function show(element, text, copyButton, breaks = true) {
    let fragment = null;
    try {
      if (/[*_`#>|~[\]-]|\d[.)]|https?:/.test(text) && !isPlain(reader.lexer(text))) {
        fragment = DOMPurify.sanitize(reader.parse(text, { breaks }), ALLOWED);
      }
    } catch {
      fragment = null; // what cannot be read is shown as it came
    }
    element.classList.toggle("rich", Boolean(fragment));
    if (!fragment) {
      element.textContent = text;
      return;
    }
    for (const link of fragment.querySelectorAll("a")) {
      link.target = "_blank";
      link.rel = "noopener noreferrer";
    }
    for (const block of fragment.querySelectorAll("pre")) block.prepend(copyButton(block.textContent));
    element.replaceChildren(fragment);
  }

  return { show };
})();
