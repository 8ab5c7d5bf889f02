"use strict";
// The player of the report, and links into its tables. The data comes from the element #data; nothing is fetched.

class Player {
  constructor(film) {
    this.film = film;
    this.find = (id) => document.getElementById(id);
    this.slider = this.find("frame");
    this.playing = false;
    this.time = 0;
    film.clips.forEach((clip, i) => this.find("clip").add(new Option(clip.name, i)));
    this.find("clip-label").hidden = film.clips.length < 2;
    this.find("gradient").style.background = `linear-gradient(to right, ${film.scale.join(", ")})`;
    this.find("top").textContent = (film.top / 1000).toFixed(3);
    this.find("play").addEventListener("click", () => this.toggle());
    this.slider.addEventListener("input", () => { this.stop(); this.show(Number(this.slider.value)); });
    this.find("clip").addEventListener("change", (event) => this.load(Number(event.target.value)));
    this.load(0);
  }

  async load(index) {
    this.stop();
    const clip = this.clip = this.film.clips[index];
    this.frames = clip.methods[0].bops.length;
    const picture = (source) => { const image = new Image(); image.src = source; return image; };
    this.sheets = [picture(clip.sheet), ...clip.methods.map((method) => picture(method.sheet))];
    this.slider.max = this.frames - 1;
    this.film.clips.forEach((_, i) => { this.find(`spending-${i}`).hidden = i !== index; });
    this.cursor = this.find(`cursor-${index}`);
    this.step = Number(this.find(`spending-${index}`).dataset.step);
    await Promise.all(this.sheets.map((image) => image.decode()));
    if (this.clip === clip) this.show(0);
  }

  show(time) {
    this.time = time;
    const { cell: [width, height], columns } = this.film;
    const at = [(time % columns) * width, Math.floor(time / columns) * height];
    const names = ["screen-clip", "screen-prediction-0", "screen-prediction-1"];
    this.sheets.forEach((sheet, i) => {
      const canvas = this.find(names[i]);
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
      canvas.getContext("2d").drawImage(sheet, at[0], at[1], width, height, 0, 0, width, height);
    });
    const said = this.clip.methods.map((method, i) => this.showBits(method, i, time));
    this.slider.value = time;
    const short = `frame ${time} of ${this.frames - 1}`;
    this.slider.setAttribute("aria-valuetext", `${short}; ${said.join("; ")}`);
    const cut = this.frames < this.clip.all ? ` (the first ${this.frames} of ${this.clip.all} frames)` : "";
    const now = this.find("now");
    now.setAttribute("aria-live", this.playing ? "off" : "polite");
    now.textContent = `${short}${cut}`;
    this.cursor.setAttribute("transform", `translate(${time * this.step} 0)`);
  }

  showBits(method, i, time) {
    const { cell: [width, height], top, names, scale } = this.film;
    const canvas = this.find(`screen-bits-${i}`), rows = method.share[time];
    if (canvas.width !== 2 * width || canvas.height !== 2 * height) [canvas.width, canvas.height] = [2 * width, 2 * height];
    const context = canvas.getContext("2d");
    rows.forEach((row, r) => row.forEach((share, c) => {
      const [left, right] = [c, c + 1].map((k) => Math.round((k * canvas.width) / row.length));
      const [above, below] = [r, r + 1].map((k) => Math.round((k * canvas.height) / rows.length));
      context.fillStyle = scale[Math.min(scale.length - 1, Math.floor((share / top) * scale.length))];
      context.fillRect(left, above, right - left, below - above);
    }));
    const kind = method.keyframe[time] ? ", keyframe" : "";
    const text = `${method.bops[time].toFixed(3)} now${kind}, ${method.running[time].toFixed(3)} mean`;
    this.find(`spent-${i}`).textContent = text;
    return `${names[i]} ${text}`;
  }

  toggle() { if (this.playing) this.stop(); else this.play(); }

  play() {
    this.playing = true;
    this.label();
    if (this.time >= this.frames - 1) this.show(0);
    let due = performance.now();
    const step = (now) => {
      if (!this.playing) return;
      const wait = 1000 / (this.clip.fps * Number(this.find("speed").value));
      if (now - due > 500) due = now;  // the tab slept
      if (now - due >= wait) {
        due += wait;
        this.show(this.time + 1);
        if (this.time >= this.frames - 1) { this.stop(); return; }
      }
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  stop() { this.playing = false; this.label(); }

  label() {
    const button = this.find("play");
    button.textContent = this.playing ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(this.playing));
  }
}

const film = JSON.parse(document.getElementById("data").textContent);
if (film) new Player(film);
addEventListener("hashchange", () => {
  const target = document.getElementById(location.hash.slice(1)), details = target && target.closest("details");
  if (!details) return;
  details.open = true;
  target.scrollIntoView({ block: "center" });
});
document.getElementById("copy").addEventListener("click", async (event) => {
  const command = document.getElementById("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    event.target.textContent = "Copied";
  } catch {  // some browsers keep pages from disk away from the clipboard
    getSelection().selectAllChildren(command);
    event.target.textContent = "Selected: press Ctrl+C";
  }
});
