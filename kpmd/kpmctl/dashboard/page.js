"use strict";
// What the dashboard shows, asked for once an interval. All that comes from the daemon (names of
// commands, labels, symbols) goes into the page as text; nothing is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";
const PATIENCE = 20000; // milliseconds for an answer
const MINUTE = 60; // points of a sparkline

const get = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// Formats

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const rate = (value) => (value > 0 && value < 100 ? fine : whole).format(value);
const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));

function steps(value, units) {
  let unit = 0;
  while (unit < units.length - 1 && value >= units[unit][0]) value /= units[unit++][0];
  return `${value < 10 && unit ? fine.format(value) : whole.format(value)} ${units[unit][1]}`;
}
const duration = (ns) => steps(ns, [[1000, "ns"], [1000, "µs"], [1000, "ms"], [60, "s"], [60, "min"], [24, "h"], [0, "d"]]);
// Buckets end at powers of two: 1023 is read as 1 Ki, so that neighbours join.
const edge = (ns) => steps(ns, [[1024, "ns"], [1024, "µs"], [1024, "ms"], [0, "s"]]);
function age(seconds) {
  const value = Math.max(0, seconds);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (value >= size) return `${Math.floor(value / size)} ${unit}`;
  }
  return `${Math.floor(value)} s`;
}
const since = (time, now) => age((now - Date.parse(time)) / 1000);
const owner = (each) => (each === null ? "–" : each.user ?? `uid ${each.uid}`);
const lifetime = (each) => each.lease ?? each.kind;
const labels = (all) => Object.entries(all).map(([key, value]) => `${key}=${value}`).join("  ");

// Parts of the page

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function element(name, className, value) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (value !== undefined) made.textContent = value;
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** One child of `parent` for each row, in their order; those that stay are kept as they are. */
function children(parent, rows, key, make, update) {
  const there = new Map([...parent.children].map((each) => [each.dataset.key, each]));
  let at = parent.firstElementChild;
  for (const row of rows) {
    const id = key(row);
    let node = there.get(id);
    there.delete(id);
    if (!node) {
      node = make(row);
      node.dataset.key = id;
    }
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
    update(node, row);
  }
  for (const each of there.values()) each.remove();
}

/** A section with a table: `cells` gives of each row its texts, or functions that fill a cell. */
function table(name, list, key, cells) {
  const section = get(name);
  const heads = [...section.querySelectorAll("thead th")];
  const fill = (row, data) => {
    cells(data).forEach((value, index) => {
      const cell = row.children[index];
      if (typeof value === "function") value(cell);
      else text(cell, value);
      if (heads[index].matches(".wide, .short, .id")) cell.title = cell.textContent; // it may be cut
    });
  };
  const make = () => {
    const row = element("tr");
    heads.forEach((head, index) => {
      const cell = element(index === 0 ? "th" : "td", head.className);
      if (index === 0) cell.scope = "row";
      row.append(cell);
    });
    return row;
  };
  children(section.querySelector("tbody"), list.rows, key, make, fill);
  ending(section, list);
}

/** What stands below a list: that it is empty, or that there is more. */
function ending(section, list) {
  section.classList.toggle("is-empty", list.rows.length === 0);
  const more = list.open ? `and more than ${count(list.more)} more` : `and ${count(list.more)} more`;
  text(section.querySelector(".more"), list.more || list.open ? more : "");
}

/** The rates of a function as a line over an area, the newest at the right. */
function sparkline(cell, rates) {
  const [width, height] = [MINUTE * 2, 22];
  const most = Math.max(...rates, 1e-9);
  if (!cell.firstChild) {
    const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", preserveAspectRatio: "none" });
    drawing.append(shape("polygon", {}), shape("polyline", {}));
    cell.append(drawing);
  }
  const points = rates.map((value, index) => {
    const x = width - 1 - (rates.length - 1 - index) * 2;
    return `${x},${(height - 2 - (value / most) * (height - 4)).toFixed(1)}`;
  });
  const [area, line] = cell.firstChild.children;
  const left = width - 1 - (rates.length - 1) * 2;
  line.setAttribute("points", points.join(" "));
  area.setAttribute("points", points.length ? `${left},${height} ${points.join(" ")} ${width - 1},${height}` : "");
  const told = rates.length ? `at most ${rate(Math.max(...rates))} calls a second` : "no rate yet";
  cell.firstChild.setAttribute("aria-label", told);
}

function makeCard() {
  const card = element("article", "card");
  const head = element("tr");
  for (const [name, value] of [["", "Time"], ["number", "Calls"], ["bar", "Share"]]) {
    const cell = element("th", name, value);
    cell.scope = "col";
    head.append(cell);
  }
  const thead = element("thead", "hidden");
  thead.append(head);
  const buckets = element("table");
  buckets.append(thead, element("tbody"));
  card.append(element("h3"), element("p", "figures"), buckets);
  return card;
}

function fillCard(card, each, everyone) {
  const [title, figures, buckets] = card.children;
  text(title, everyone ? `${each.function} · ${owner(each.owner)}` : each.function);
  const told = `${count(each.calls)} calls · mean ${duration(each.mean)} · half within ` +
    `${duration(each.half)} · 99 % within ${duration(each.most)} · longest ${duration(each.longest)}`;
  text(figures, told);
  const most = Math.max(...each.slots, 1);
  const rows = each.slots.map((many, index) => ({ many, slot: each.first + index }));
  const make = () => {
    const row = element("tr");
    const range = element("th");
    range.scope = "row";
    const bar = element("td", "bar");
    bar.append(element("div"));
    row.append(range, element("td", "number"), bar);
    return row;
  };
  children(buckets.lastChild, rows, (row) => String(row.slot), make, (node, row) => {
    const [range, number, bar] = node.children;
    text(range, `${row.slot ? edge(2 ** row.slot) : "0 ns"} – ${edge(2 ** (row.slot + 1))}`);
    text(number, count(row.many));
    bar.firstChild.style.width = `${(100 * row.many) / most}%`;
    bar.firstChild.hidden = row.many === 0;
  });
}

// What is shown

function state(cell, link) {
  if (!cell.firstChild) cell.append(element("span"));
  cell.firstChild.className = `state ${link.state === "attached" ? "good" : "ending"}`;
  text(cell.firstChild, link.reason ? `${link.state}: ${link.reason}` : link.state);
}

function functions(link) {
  const names = link.functions.join(", ") || "–";
  return link.count > link.functions.length ? `${names}, …` : names;
}

function show(sample) {
  const { now, everyone } = sample;
  document.body.classList.toggle("everyone", everyone);
  text(get("about"), `Linux ${sample.release} · ${everyone ? "what everyone has" : "what is yours"}`);

  const total = (name, value, open) => text(get(`total-${name}`), count(value) + (open ? "+" : ""));
  const all = (list) => list.rows.length + list.more;
  const sum = (list, of) => list.rows.reduce((before, each) => before + of(each), 0);
  const cut = sample.links.more > 0 || sample.links.open;
  for (const name of ["links", "clients", "programs", "leases"]) {
    total(name, all(sample[name]), sample[name].open);
  }
  total("functions", sum(sample.links, (each) => each.count), cut);
  const told = sample.links.rows.some((each) => each.missed !== null);
  total("missed", told ? sum(sample.links, (each) => each.missed ?? 0) : null, told && cut);
  const rates = sample.rates;
  const busy = sum(rates, (each) => each.rates.at(-1) ?? 0);
  text(get("total-rate"), rates.rows.length ? rate(busy) + (rates.more ? "+" : "") : "–");

  table("rates", rates, (each) => each.map + each.address, (each) => [
    each.function,
    owner(each.owner),
    each.rates.length ? rate(each.rates.at(-1)) : "–",
    (cell) => sparkline(cell, each.rates),
    count(each.calls),
  ]);
  const section = get("histograms");
  const histograms = sample.histograms;
  children(section.querySelector(".cards"), histograms.rows, (each) => each.map + each.address,
    makeCard, (card, each) => fillCard(card, each, everyone));
  ending(section, histograms);

  const commands = new Map(sample.clients.rows.map((each) => [each.id, `${each.command} [${each.pid}]`]));
  table("links", sample.links, (each) => each.id, (each) => [
    functions(each),
    count(each.count),
    each.kind,
    (cell) => state(cell, each),
    count(each.missed),
    lifetime(each.lifetime),
    commands.get(each.client) ?? each.client,
    owner(each.owner),
    since(each.created_at, now),
    labels(each.labels),
    each.id,
  ]);
  table("clients", sample.clients, (each) => each.id, (each) => [
    each.command,
    String(each.pid),
    String(each.uid),
    count(each.links),
    count(each.programs),
    count(each.leases),
    since(each.since, now),
    each.id,
  ]);
  table("programs", sample.programs, (each) => each.id, (each) => [
    each.name,
    each.attach,
    count(each.links),
    count(each.verified_instructions),
    lifetime(each.lifetime),
    owner(each.owner),
    since(each.created_at, now),
    labels(each.labels),
    each.id,
  ]);
  table("leases", sample.leases, (each) => each.id, (each) => [
    each.id,
    age((Date.parse(each.expires_at) - now) / 1000),
    age(each.ttl),
    count(each.links),
    count(each.programs),
    owner(each.owner),
    labels(each.labels),
  ]);
  children(get("notes"), sample.notes, (each) => each, (each) => element("p", "note", each), () => {});
}

function details(event) {
  const parts = [];
  if (event.name) parts.push(event.name);
  if (event.kind) parts.push(`${event.kind} of ${count(event.count)} ${event.count === 1 ? "function" : "functions"}`);
  if (event.pid) parts.push(`${event.command} [${event.pid}]`);
  if (event.reason) parts.push(event.reason);
  return parts.join(" · ");
}

/** Events go on top; the list is as long as what the server keeps. */
function feed(told) {
  const list = get("events");
  for (const event of told.rows) {
    const item = element("li", event.gap ? "gap" : event.event);
    const time = new Date(event.time);
    const stamp = element("time", "", time.toLocaleTimeString("en-GB"));
    stamp.dateTime = time.toISOString();
    item.append(stamp, " ");
    if (event.gap) item.append(event.gap);
    else {
      item.append(element("strong", "", `${event.what} ${event.event}`), element("span", "", details(event)));
      item.append(element("small", "", event.id));
    }
    list.prepend(item);
  }
  while (list.childElementCount > told.most) list.lastElementChild.remove();
  get("events-empty").hidden = list.childElementCount > 0;
  get("events-trouble").hidden = !told.trouble;
  text(get("events-trouble"), told.trouble ?? "");
}

// Asking

function status(kind, message) {
  document.body.dataset.status = kind;
  text(get("status"), message);
}

let last = 0; // the number of the newest event that is shown

/** Ask once, and show it. Gives the time to wait in milliseconds; Infinity where asking is vain. */
async function poll() {
  const token = location.hash.slice(1);
  let answer;
  try {
    const response = await fetch(`state?after=${last}`, {
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!response.ok) {
      status("refused", await response.text());
      return response.status < 500 ? Infinity : 5000;
    }
    answer = await response.json();
  } catch {
    status("away", "kpmctl dashboard does not answer. It may have been ended: start it again, and open its new address.");
    return 2000;
  }
  const { sample } = answer;
  if (sample.links) show(sample);
  feed(answer.feed);
  last = answer.feed.last;
  if (sample.trouble) status("away", `Trying again: ${sample.trouble}`);
  else status("live", "Live");
  return sample.interval;
}

/** The next time that somebody looks at this page, or gives it another token. */
const change = () => new Promise((done) => {
  document.addEventListener("visibilitychange", done, { once: true });
  addEventListener("hashchange", done, { once: true });
});

for (;;) {
  if (document.hidden) await change();
  else {
    const pause = await poll();
    await (pause === Infinity ? change() : sleep(pause));
  }
}
