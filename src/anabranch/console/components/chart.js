// A line chart as SVG. It draws what it was given and what is pushed to it, in the page's colours.
//
// series: [{ name, points: [[x, y], ...] }], x in seconds since 1970 for axis "time".
// push([x, y0, y1, ...]) adds a point to every series (null: none) and forgets what left the window.
const HEIGHT = 190;
const LEFT = 46;
const RIGHT = 10;
const TOP = 10;
const BOTTOM = 24;

export default {
  template: `
    <figure class="chart" role="group" :aria-label="label">
      <figcaption>
        <span class="chart-title">{{ title }}</span>
        <span class="chart-legend">
          <span v-for="(s, i) in shown" :key="s.name" :class="'key s' + i">
            <i aria-hidden="true"></i><template v-if="shown.length > 1">{{ s.name }}</template>
            <b>{{ text(at(s)) }}</b>
          </span>
        </span>
      </figcaption>
      <div ref="box" class="chart-box" @pointermove="move" @pointerleave="cursor = null">
        <svg :viewBox="'0 0 ' + width + ' ' + height" :width="width" :height="height"
             role="img" :aria-label="label">
          <g class="grid" aria-hidden="true">
            <template v-for="t in yTicks" :key="t">
              <line :x1="left" :x2="width - right" :y1="y(t)" :y2="y(t)" />
              <text :x="left - 8" :y="y(t) + 4" text-anchor="end">{{ tick(t) }}</text>
            </template>
            <text v-for="t in xTicks" :key="'x' + t[0]" :x="x(t[0])" :y="height - 6"
                  :text-anchor="t[2]">{{ t[1] }}</text>
          </g>
          <g v-for="(s, i) in shown" :key="s.name" :class="'line s' + i" aria-hidden="true">
            <path v-if="area && i === 0" class="area" :d="areaPath(s.points)" />
            <path v-if="!marks.includes(s.name)" :class="{ level: levels.includes(s.name) }"
                  :d="path(s.points)" />
            <circle v-for="p in dots(s)" :key="p[0]" :cx="x(p[0])" :cy="y(p[1])" r="2.5" />
          </g>
          <g v-if="cursor !== null" class="cursor" aria-hidden="true">
            <line :x1="x(cursor)" :x2="x(cursor)" :y1="top" :y2="height - bottom" />
            <text :x="x(cursor)" :y="height - 6" text-anchor="middle">{{ xText(cursor) }}</text>
          </g>
          <text v-if="empty" class="nothing" :x="(left + width - right) / 2" :y="height / 2"
                text-anchor="middle">{{ nothing }}</text>
        </svg>
      </div>
    </figure>`,
  props: {
    title: String,
    unit: { type: String, default: "" },
    axis: { type: String, default: "number" },
    series: { type: Array, default: () => [] },
    window: { type: Number, default: 0 },
    area: { type: Boolean, default: false },
    maximum: { type: Number, default: null },
    levels: { type: Array, default: () => [] },
    marks: { type: Array, default: () => [] },
    xLabel: { type: String, default: "" },
    logX: { type: Boolean, default: false },
    nothing: { type: String, default: "nothing yet" },
  },
  data() {
    return {
      shown: this.copy(), width: 480, cursor: null, label: "",
      height: HEIGHT, left: LEFT, right: RIGHT, top: TOP, bottom: BOTTOM,
    };
  },
  watch: {
    series() {
      this.shown = this.copy();
      this.describe();
    },
  },
  mounted() {
    this.observer = new ResizeObserver(([entry]) => {
      this.width = Math.max(220, Math.round(entry.contentRect.width));
    });
    this.observer.observe(this.$refs.box);
    this.describe();
    // A screen reader is told now and then, not every second.
    this.describing = setInterval(() => this.describe(), 10000);
  },
  unmounted() {
    this.observer.disconnect();
    clearInterval(this.describing);
  },
  computed: {
    points() { return this.shown.flatMap((s) => s.points.filter((p) => p[1] !== null)); },
    empty() { return this.points.length === 0; },
    xRange() {
      if (this.axis === "time" && this.window) {
        const ends = this.shown.map((s) => s.points.length ? s.points[s.points.length - 1][0] : 0);
        const end = Math.max(...ends, 0) || Date.now() / 1000;
        return [end - this.window, end];
      }
      const xs = this.points.map((p) => p[0]);
      if (!xs.length) return [0, 1];
      const low = Math.min(...xs), high = Math.max(...xs);
      return low === high ? [low - 1, high + 1] : [low, high];
    },
    yRange() {
      const ys = this.points.map((p) => p[1]);
      let high = this.maximum ?? (ys.length ? Math.max(...ys) : 1);
      let low = Math.min(0, ...ys);
      if (this.axis === "number" && ys.length) {
        low = Math.min(...ys);
        if (low > 0 && low < 0.6 * high) low = 0;
      }
      if (high <= low) high = low + (Math.abs(low) * 0.1 || 1);
      return [low, high];
    },
    yTicks() { return ticks(...this.yRange, 4); },
    xTicks() {
      const [low, high] = this.xRange;
      if (this.cursor !== null || this.empty) return [];
      if (this.axis === "time") return [[low, `${Math.round((high - low) / 60)} min ago`, "start"], [high, "now", "end"]];
      if (this.logX) return [[low, this.xText(low), "start"], [high, this.xText(high), "end"]];
      const found = ticks(low, high, Math.max(2, Math.floor(this.width / 110)))
        .filter((t) => t >= low && t <= high);
      return found.map((t, i) => {
        const last = i === found.length - 1;
        const anchor = i === 0 && found.length > 1 ? "start" : last && found.length > 1 ? "end" : "middle";
        return [t, last && this.xLabel ? `${this.xLabel} ${short(t)}` : short(t), anchor];
      });
    },
  },
  methods: {
    copy() { return this.series.map((s) => ({ name: s.name, points: s.points.slice() })); },
    push(row) {
      const start = row[0] - this.window;
      this.shown.forEach((s, i) => {
        s.points.push([row[0], row[i + 1]]);
        while (this.window && s.points.length && s.points[0][0] < start) s.points.shift();
      });
    },
    scale(v) { return this.logX ? Math.log10(Math.max(v, 1e-12)) : v; },
    x(v) {
      const [low, high] = this.xRange.map(this.scale);
      return LEFT + ((this.scale(v) - low) / (high - low || 1)) * (this.width - LEFT - RIGHT);
    },
    y(v) {
      const [low, high] = this.yRange;
      return HEIGHT - BOTTOM - ((v - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    },
    path(points) {
      let d = "", pen = false;
      for (const [px, py] of points) {
        if (py === null) { pen = false; continue; }
        d += `${pen ? "L" : "M"}${this.x(px).toFixed(1)} ${this.y(py).toFixed(1)}`;
        pen = true;
      }
      return d;
    },
    areaPath(points) {
      const known = points.filter((p) => p[1] !== null);
      if (known.length < 2) return "";
      const base = this.y(this.yRange[0]).toFixed(1);
      return `${this.path(known)}L${this.x(known[known.length - 1][0]).toFixed(1)} ${base}` +
        `L${this.x(known[0][0]).toFixed(1)} ${base}Z`;
    },
    dots(s) {
      if (this.levels.includes(s.name)) return [];
      const few = s.points.length < 25 && this.axis !== "time";
      return few || this.marks.includes(s.name) ? s.points.filter((p) => p[1] !== null) : [];
    },
    at(s) {
      if (!s.points.length) return null;
      if (this.cursor === null) return s.points[s.points.length - 1][1];
      return nearest(s.points, this.cursor)[1];
    },
    move(event) {
      if (this.empty) return;
      const box = this.$refs.box.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      const [low, high] = this.xRange.map(this.scale);
      const raw = low + Math.min(1, Math.max(0, share)) * (high - low);
      this.cursor = nearest(this.points, this.logX ? 10 ** raw : raw)[0];
    },
    xText(v) {
      if (this.axis === "time") return new Date(v * 1000).toLocaleTimeString();
      return this.xLabel ? `${this.xLabel} ${short(v)}` : short(v);
    },
    tick(v) { return this.unit === "%" || this.unit === "s" ? this.text(v) : short(v); },
    text(v) {
      if (v === null || v === undefined) return "–";
      if (this.unit === "%") return `${Math.round(v * 100)} %`;
      if (this.unit === "s") return v < 1 ? `${Math.round(v * 1000)} ms` : `${short(v)} s`;
      return this.unit ? `${short(v)} ${this.unit}` : short(v);
    },
    describe() {
      const now = this.shown.map((s) => `${s.name} ${this.text(this.at(s))}`).join(", ");
      this.label = this.empty ? `${this.title}: ${this.nothing}` : `${this.title}: ${now}`;
    },
  },
};

function nearest(points, x) {
  return points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best), points[0]);
}

function short(v) {
  const size = Math.abs(v);
  if (size >= 1e6) return `${+(v / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${+(v / 1e3).toPrecision(3)} k`;
  return `${size >= 100 ? Math.round(v) : +v.toPrecision(3)}`;
}

function ticks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= raw) || power;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(+t.toPrecision(12));
  return found;
}
