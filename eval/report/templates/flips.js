"use strict";
// One changed item at a time. What is shown is a copy of a list entry, so without this script nothing is lost, and all
// text stays text: nothing here makes markup.
(() => {
  const browser = document.querySelector(".browser");
  if (!browser) return;
  const tools = browser.querySelector(".tools");
  const stage = browser.querySelector(".stage");
  const status = tools.querySelector("output");
  const [task, change, text] = ["task", "change", "text"].map((name) => tools.querySelector(`[name=${name}]`));
  const entries = [...browser.querySelectorAll(".flips > li")].map((entry) => ({
    item: entry.dataset.item,
    ...entry.parentElement.dataset,
    body: entry.firstElementChild,
    words: `${entry.dataset.item} ${entry.textContent}`.toLowerCase(),
  }));
  let found = entries;
  let place = 0;

  function show() {
    const entry = found[place];
    status.textContent = entry ? `${place + 1} of ${found.length}` : "0 items";
    const heading = document.createElement("h3");
    heading.textContent = entry ? `${entry.task}, ${entry.change} · ${entry.item}` : "No item matches.";
    stage.replaceChildren(heading, ...(entry ? [entry.body.cloneNode(true)] : []));
    mark(text.value.trim().toLowerCase());
  }

  function mark(wanted) {
    if (!("highlights" in CSS)) return;
    CSS.highlights.delete("found");
    if (!wanted) return;
    const ranges = [];
    const walker = document.createTreeWalker(stage, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const words = walker.currentNode.data.toLowerCase();
      if (words.length !== walker.currentNode.data.length) continue; // lower case may be longer: places would not fit
      for (let at = words.indexOf(wanted); at >= 0; at = words.indexOf(wanted, at + wanted.length)) {
        const range = document.createRange();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + wanted.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  function filter() {
    const wanted = text.value.trim().toLowerCase();
    const fits = (field, value) => field.value === "" || field.value === value;
    found = entries.filter(
      (entry) => fits(task, entry.task) && fits(change, entry.change) && entry.words.includes(wanted),
    );
    place = 0;
    show();
  }

  function go(to) {
    if (!found.length) return;
    place = (to + found.length) % found.length;
    show();
  }

  const steps = {
    ArrowRight: () => go(place + 1), j: () => go(place + 1),
    ArrowLeft: () => go(place - 1), k: () => go(place - 1),
    Home: () => go(0), End: () => go(found.length - 1),
    "/": () => text.focus(),
  };
  const typing = { ArrowDown: steps.ArrowRight, ArrowUp: steps.ArrowLeft, Enter: steps.ArrowRight };

  browser.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    const step = (event.target === text ? typing : steps)[event.key];
    if (!step) return;
    event.preventDefault();
    step();
  });
  tools.querySelector("[name=previous]").addEventListener("click", steps.ArrowLeft);
  tools.querySelector("[name=next]").addEventListener("click", steps.ArrowRight);
  for (const field of [task, change, text]) field.addEventListener("input", filter);
  for (const part of browser.querySelectorAll("[hidden]")) part.hidden = false;
  browser.querySelector(".lists").open = false;
  show();
})();
