// Pages on which something is written: forms that are sent as data, and answers and notes that are saved as they are typed.
(() => {
  const send = async (url, body) => {
    const text = JSON.stringify(body);
    const answer = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: text, keepalive: text.length < 50_000 });
    const said = await answer.text();
    if (answer.ok) return JSON.parse(said);
    throw Object.assign(new Error(answer.headers.get("content-type")?.includes("json") ? JSON.parse(said).problem : said), { refused: true });
  };

  // Saves what `body` gives, one request after the other, each answering to the version before it; goes on trying while the server is away.
  const keeper = (url, body, version, say, adopt) => {
    let timer = 0, turn = Promise.resolve(), under_way = 0, unsent = false;
    const sent = async (what) => {
      under_way = 1;
      try {
        const answer = await send(url, what);
        version = answer.version;
        return answer;
      } finally {
        under_way = 0;
      }
    };
    const save = async () => {
      for (;;) {
        clearTimeout(timer);
        timer = 0;
        try {
          const answer = await sent({ ...body(), version });
          unsent = timer !== 0;
          say(unsent ? "" : "saved");
          return answer;
        } catch (error) {
          say(error.refused ? error.message : "not saved yet: the server does not answer; trying again", true);
          if (error.refused) {
            unsent = false; // it would be refused again
            throw error;
          }
          await new Promise((again) => setTimeout(again, 1000));
        }
      }
    };
    const now = () => (turn = turn.catch(() => {}).then(save));
    const soon = () => {
      say("");
      unsent = true;
      clearTimeout(timer);
      timer = setTimeout(() => now().catch(() => {}), 250);
    };
    // What was typed just before the page was left may arrive after the next page was read: that one sends it again, and
    // shows it; it is forgotten when it has arrived.
    const place = () => `${url} ${body().annotator} ${body().item}`;
    addEventListener("pagehide", () => {
      if (!unsent) return;
      const left = { ...body(), version: version + under_way };
      sessionStorage.setItem("left", JSON.stringify({ url, left, place: place() }));
      send(url, left).catch(() => {});
    });
    const text = sessionStorage.getItem("left"), before = JSON.parse(text);
    const arrived = () => { if (sessionStorage.getItem("left") === text) sessionStorage.removeItem("left"); };
    if (before && before.place !== place()) send(before.url, before.left).then(arrived, (error) => error.refused && arrived());
    else if (before) {
      adopt(before.left);
      turn = sent(before.left).then(arrived, () => { arrived(); location.reload(); });
    }
    return { now, soon };
  };
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // what was saved since is newer than the page
  const teller = (output) => (text, wrong = false) => {
    output.textContent = text;
    output.toggleAttribute("data-wrong", wrong);
  };

  // -- forms -----------------------------------------------------------------------------------------------------
  for (const form of document.querySelectorAll("form[data-post]")) form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const say = teller(form.querySelector("output")), body = {};
    for (const field of form.querySelectorAll("[name]")) {
      if (field.type !== "file") body[field.name] = field.type === "number" ? Number(field.value) : field.value;
      else if (field.files.length) body[field.name] = await field.files[0].text();
      if (field.name === "text") body.file = field.files[0].name;
    }
    say("working ...");
    try {
      await send(form.dataset.post, body);
      location.reload();
    } catch (error) {
      say(error.refused ? error.message : "the server does not answer", true);
    }
  });

  // -- a note on a neuron ----------------------------------------------------------------------------------------
  const note = document.querySelector("form.note");
  if (note) {
    const text = note.querySelector("textarea");
    const kept = keeper(note.dataset.save, () => ({ note: text.value.trim() }), Number(note.dataset.version), teller(note.querySelector("output")), (left) => { text.value = left.note; });
    text.addEventListener("input", kept.soon);
    text.addEventListener("keydown", (event) => { if (event.key === "Escape") text.blur(); });
    note.addEventListener("submit", (event) => event.preventDefault());
    window.keysOfPage.n = () => {
      text.focus();
      text.setSelectionRange(text.value.length, text.value.length);
    };
  }

  // -- a blinded sheet -------------------------------------------------------------------------------------------
  const sheet = document.querySelector("form.sheet");
  if (!sheet) return;
  const { version, ...item } = JSON.parse(sheet.dataset.item), first = sheet.dataset.half === "annotate", place = sheet.dataset.place;
  const say = teller(sheet.querySelector("output"));
  const kept = keeper(sheet.dataset.save, () => item, version, say, ({ patterns, applies }) => Object.assign(item, { patterns, applies }));
  const boxes = [...sheet.querySelectorAll(".prefixes input")], rows = () => [...sheet.querySelectorAll(".typed li")];
  let current = 0;
  const pattern = () => item.patterns?.[current];

  const show = () => { // what is marked, and where one is
    rows().forEach((row, k) => {
      const { indices, kind } = item.patterns[k];
      row.querySelector(".pick").setAttribute("aria-pressed", k === current);
      row.querySelector(".kind").textContent = kind;
      row.querySelector("small").textContent = `${indices.length} of ${boxes.length}`;
    });
    if (!first) return;
    for (const box of boxes) {
      const number = Number(box.value), named = (item.patterns ?? []).flatMap(({ indices }, k) => indices.includes(number) ? [k + 1] : []);
      box.checked = named.includes(current + 1);
      box.parentElement.querySelector(".marks").textContent = named.join(" ");
    }
    sheet.querySelector(".nothing").setAttribute("aria-pressed", item.patterns?.length === 0);
  };
  const draw = () => { // one row a pattern
    sheet.querySelector(".typed")?.replaceChildren(...(item.patterns ?? []).map((typed, k) => {
      const row = sheet.querySelector("template").content.firstElementChild.cloneNode(true), text = row.querySelector(".description");
      const name = `pattern ${k + 1}`;
      Object.assign(row.querySelector(".pick"), { textContent: k + 1, title: `${name}: mark its texts` }).addEventListener("click", () => choose(k));
      Object.assign(text, { value: typed.description, ariaLabel: `${name}: what they have in common` });
      text.addEventListener("focus", () => choose(k));
      text.addEventListener("input", () => { typed.description = text.value; kept.soon(); });
      text.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== "Escape") return;
        event.preventDefault();
        here().focus();
      });
      row.querySelector(".kind").addEventListener("click", () => { choose(k); turn(); });
      Object.assign(row.querySelector(".remove"), { ariaLabel: `remove ${name}` }).addEventListener("click", () => { choose(k); remove(); });
      return row;
    }));
    show();
  };
  const change = (redraw) => {
    (redraw ? draw : show)();
    kept.soon();
  };
  const choose = (k) => { if (k < (item.patterns?.length ?? 0)) { current = k; show(); } };
  const add = () => {
    item.patterns = [...(item.patterns ?? []), { description: "", indices: [], kind: "shallow" }];
    current = item.patterns.length - 1;
    change(true);
  };
  const remove = () => {
    if (!pattern()) return;
    item.patterns.splice(current, 1);
    current = Math.max(0, current - 1);
    if (!item.patterns.length) item.patterns = item.applies = null;
    change(true);
  };
  const turn = () => {
    if (!pattern()) return;
    pattern().kind = pattern().kind === "shallow" ? "semantic" : "shallow";
    change();
  };
  const describe = () => rows()[current]?.querySelector("input").focus();
  let last = boxes[0];
  const here = () => last;
  for (const box of boxes) {
    box.addEventListener("focus", () => { last = box; });
    box.addEventListener("change", () => {
      const number = Number(box.value), marks = box.checked;
      if (first && !pattern()) add();
      const marked = first ? pattern().indices : item.applies ?? [];
      const now = (marks ? [...marked, number] : marked.filter((other) => other !== number)).sort((a, b) => a - b);
      if (first) pattern().indices = now;
      else item.applies = now;
      change();
    });
  }
  const step = (by) => {
    const at = document.activeElement === last ? boxes.indexOf(last) + by : boxes.indexOf(last);
    boxes[Math.min(Math.max(at, 0), boxes.length - 1)].focus();
  };

  const go = (number, half) => { location.href = number ? `${place}&item=${number}${half}` : place; };
  const finish = async () => {
    if (first && !item.patterns) return say("add a pattern first, or say that there is nothing in common", true);
    if (!first) item.applies ??= [];
    const answer = await kept.now().catch(() => null);
    if (!answer) return;
    if (answer.problem) say(answer.problem, true);
    else if (first && item.patterns.length) go(item.item, "&half=apply");
    else go(answer.next, "");
  };
  const nothing = () => {
    if (item.patterns?.length) return say("remove the patterns first", true);
    item.patterns = [];
    item.applies = null;
    show();
    finish();
  };
  sheet.addEventListener("submit", (event) => { event.preventDefault(); finish(); });
  sheet.querySelector(".add")?.addEventListener("click", () => { add(); describe(); });
  sheet.querySelector(".nothing")?.addEventListener("click", nothing);
  draw();
  if (sheet.querySelector("fieldset").disabled) return;
  boxes[0].focus({ preventScroll: true });
  const keys = { ArrowDown: () => step(1), ArrowUp: () => step(-1), Enter: finish, o: () => { location.href = place; } };
  const more = first
    ? { a: () => { add(); describe(); }, d: describe, t: turn, x: remove, 0: nothing }
    : { b: () => go(item.item, "") };
  const digits = first ? Object.fromEntries([...Array(9).keys()].map((k) => [k + 1, () => choose(k)])) : {};
  Object.assign(window.keysOfPage, keys, more, digits);
})();
