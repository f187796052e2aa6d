// Curves, drawn by uPlot. Colours come from the style sheet, so that they follow light and dark.

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const short = value => {
  if (value == null) return '–';
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace('e+', 'e');
  return String(Number(value.toPrecision(size >= 100 ? 4 : 3)));
};

// A chart of `lines`: {name, colour, dots}. Its data are arrays, steps first; null is a gap.
export class Chart {
  constructor(parent, title, lines) {
    this.lines = lines;
    this.title = title;
    this.figure = document.createElement('figure');
    this.figure.className = 'chart';
    this.caption = document.createElement('figcaption');
    this.box = document.createElement('div');
    this.figure.append(this.caption, this.box);
    parent.append(this.figure);
    const name = document.createElement('b');
    name.textContent = title;
    this.caption.append(name);
    this.values = lines.map(line => {
      const key = document.createElement('span');
      key.className = 'key';
      const mark = document.createElement('i');
      mark.style.background = `var(${line.colour})`;
      if (line.dots) mark.className = 'dots';
      const value = document.createElement('span');
      key.append(mark, `${line.name} `, value);
      this.caption.append(key);
      return value;
    });
    this.data = [[], ...lines.map(() => [])];
    this.draw();
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.figure);
  }

  size() { return { width: Math.max(200, this.figure.clientWidth), height: 200 }; }

  // Anew: for new colours.
  draw() {
    this.plot?.destroy();
    const axis = { stroke: colour('--soft'), grid: { stroke: colour('--grid'), width: 1 }, ticks: { stroke: colour('--grid') }, font: '12px system-ui' };
    const series = this.lines.map(line => ({
      label: line.name, stroke: colour(line.colour), width: line.dots ? 1 : 1.5, spanGaps: Boolean(line.dots),
      points: { show: Boolean(line.dots), size: 6, fill: colour(line.colour) },
    }));
    const plain = (_, ticks) => ticks.map(short);
    this.plot = new uPlot({
      ...this.size(), series: [{}, ...series], scales: { x: { time: false } }, legend: { show: false },
      cursor: { points: { size: 6 } }, axes: [{ ...axis, values: plain, space: 60, size: 28 }, { ...axis, values: plain, size: 56 }],
      hooks: { setCursor: [() => this.tell()] },
    }, this.data, this.box);
    this.tell();
  }

  show(data) {
    this.data = data;
    this.plot.setData(data);
    this.tell();
  }

  // The values under the pointer, or the newest.
  tell() {
    const at = this.plot?.cursor.idx;
    const last = column => column.findLast(value => value != null);
    this.values.forEach((value, line) => {
      const column = this.data[line + 1];
      value.textContent = short(at == null ? last(column) : column[at]);
    });
    const now = this.lines.map((line, at) => `${line.name} ${short(last(this.data[at + 1]))}`).join(', ');
    this.box.setAttribute('role', 'img');
    this.box.setAttribute('aria-label', `${this.title} over ${this.data[0].length} points; newest: ${now}`);
  }
}
