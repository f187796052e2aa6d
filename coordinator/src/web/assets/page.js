// Asks the coordinator for its state every second and shows it. Texts from outside are only ever set as text.

import { Chart } from './charts.js';

const $ = id => document.getElementById(id);
const element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'class') made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children.filter(child => child != null));
  return made;
};
const number = (value, digits = 0) => value == null ? '–' : value.toLocaleString('en', { maximumFractionDigits: digits });
const seconds = value => value == null ? '–' : value < 10 ? `${value.toFixed(2)} s` : span(value);
const span = value => {
  const s = Math.round(value);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s % 86400 / 3600)} h`;
};
const DAY = { day: 'numeric', month: 'short' };
const clock = (unix, style = { ...DAY, hour: '2-digit', minute: '2-digit', second: '2-digit' }) => {
  const date = new Date(unix * 1000);
  return element('time', { datetime: date.toISOString(), title: date.toString() }, date.toLocaleString('en-GB', style));
};
const gigabytes = value => value == null ? '–' : `${(value / 1e9).toFixed(2)} GB`;

const COLUMNS = ['step', 'task', 'logit', 'feature', 'grad_norm', 'learning_rate', 'data_s', 'step_s', 'samples_per_s'];
const CAUSES = {
  final_steps: 'final steps', data: 'waiting for data', validation: 'validation', pictures: 'drawing pictures', between_steps: 'between steps',
  void_step: 'steps made void by a failure', waiting_for_workers: 'waiting for workers', loading_models: 'loading models',
  forming: 'opening the collective', regrouping: 'meeting for a planned change', recovering: 'leaving a broken collective',
  workers_returning: 'waiting for workers to come back', last_checkpoint: 'storing the last checkpoint',
};
const TRAINING = ['data', 'compute', 'collective', 'update', 'snapshot', 'validating', 'sampling', 'warming'];

const series = Object.fromEntries(COLUMNS.map(name => [name, []]));
let edition = 0;
let charts;

// Takes what is new, from the page's last point on.
function take(columns) {
  const keep = columns.all ? 0 : series.step.findIndex(step => step >= (columns.step[0] ?? Infinity));
  for (const name of COLUMNS) {
    if (keep >= 0) series[name].length = keep;
    series[name].push(...columns[name]);
  }
  edition = columns.edition;
}

// Losses of training and of validation on the same steps.
function joined(train, steps, values) {
  const at = [...new Set([...series.step, ...steps])].sort((a, b) => a - b);
  const of = (steps, values) => { const map = new Map(steps.map((step, i) => [step, values[i]])); return at.map(step => map.get(step)); };
  return [at, of(series.step, train), of(steps, values)];
}

function curves(state) {
  const loss = (name, title, colour) => new Chart($('charts'), title, [{ name: 'train', colour }, { name: 'validation', colour: '--c4', dots: true }]);
  charts ??= {
    total: loss('total', 'Total loss', '--c1'), task: loss('task', 'Diffusion loss', '--c1'),
    logit: loss('logit', 'Distance of predictions', '--c1'), feature: loss('feature', 'Distance of features', '--c1'),
    rate: new Chart($('charts'), 'Samples a second', [{ name: 'all workers', colour: '--c2' }]),
    lr: new Chart($('charts'), 'Learning rate', [{ name: 'rate', colour: '--c3' }]),
    time: new Chart($('charts'), 'Seconds a step', [{ name: 'step', colour: '--c2' }, { name: 'data wait', colour: '--c3' }]),
    norm: new Chart($('charts'), 'Gradient norm', [{ name: 'norm', colour: '--c4' }]),
  };
  const total = series.task.map((task, i) => task == null ? null : task + series.logit[i] + state.feature_weight * series.feature[i]);
  const { step, task, logit, feature, total: validated } = state.validation;
  charts.total.show(joined(total, step, validated));
  charts.task.show(joined(series.task, step, task));
  charts.logit.show(joined(series.logit, step, logit));
  charts.feature.show(joined(series.feature, step, feature));
  charts.rate.show([series.step, series.samples_per_s]);
  charts.lr.show([series.step, series.learning_rate]);
  charts.time.show([series.step, series.step_s, series.data_s]);
  charts.norm.show([series.step, series.grad_norm]);
}

function summary(state) {
  document.title = `${state.job}: step ${state.step}`;
  $('job').textContent = state.job;
  $('state').textContent = state.state;
  const share = state.total_steps ? state.step / state.total_steps : 0;
  $('bar').style.width = `${100 * share}%`;
  const bar = $('bar').parentElement;
  bar.hidden = !state.total_steps;
  bar.setAttribute('aria-valuemax', state.total_steps ?? 0);
  bar.setAttribute('aria-valuenow', state.step);
  const of = (...texts) => element('small', {}, ...texts);
  const minute = unix => clock(unix, { ...DAY, hour: '2-digit', minute: '2-digit' });
  $('t-step').replaceChildren(number(state.step), ...(state.total_steps ? [of(`of ${number(state.total_steps)}`)] : []));
  $('t-rate').textContent = number(state.samples_per_s, 1);
  $('t-goodput').textContent = `${(100 * state.goodput.ratio).toFixed(1)} %`;
  const members = state.workers.filter(worker => worker.member).length;
  $('t-workers').replaceChildren(number(members), of(`of ${state.world_size}`));
  $('t-generation').textContent = number(state.generation);
  $('t-epoch').textContent = number(state.epoch);
  $('t-checkpoint').textContent = state.checkpoint_step == null ? 'none yet' : number(state.checkpoint_step);
  const { unix_s: now, started_unix_s: from, ended_unix_s: ended, left_s: left } = state;
  $('t-elapsed').replaceChildren(span((ended ?? now) - from), of('since ', minute(from)));
  $('t-left').replaceChildren(...(ended != null ? ['–', of('ended ', minute(ended))] : left ? [span(left), of('until ', minute(now + left))] : ['–']));
  const since = state.known_since_step;
  $('since').hidden = !(since > 1);
  $('since').textContent = `The coordinator was started again: curves before step ${number(since)} are from its logs, events and times since then.`;
}

// Anew only when there is news: it is read out.
let failed = '';
function failure({ first_failure: first }) {
  const key = JSON.stringify(first);
  if (key === failed) return;
  failed = key;
  $('failure').hidden = !first;
  if (!first) return;
  const isHealed = first.healed_step != null;
  $('failure').className = isHealed ? 'alert past' : 'alert';
  const what = isHealed ? [`Healed at step ${number(first.healed_step)}: a failure of `] : ['First failure, '];
  $('failure').replaceChildren(...what, clock(first.unix_s), `: ${first.text}`);
}

function workers(state) {
  const hasGpus = state.workers.some(worker => worker.gpu_memory_bytes != null);
  $('h-gpu').hidden = !hasGpus;
  const gpu = worker => worker.gpu_memory_bytes == null ? '–' : `${gigabytes(worker.gpu_memory_used_bytes)} of ${gigabytes(worker.gpu_memory_bytes)}`;
  $('workers').replaceChildren(...state.workers.flatMap(worker => {
    const kind = worker.phase === 'lost' ? 'lost' : TRAINING.includes(worker.phase) ? 'train' : '';
    const spare = worker.member || worker.why ? '' : worker.phase === 'waiting' ? ' (not a member)' : '';
    const cells = [
      element('th', { scope: 'row' }, String(worker.rank)), element('td', {}, element('span', { class: `phase ${kind}` }, worker.phase), spare),
      ...[number(worker.step), seconds(worker.step_s), seconds(worker.data_s), seconds(worker.collective_s), gigabytes(worker.memory_bytes),
        ...(hasGpus ? [gpu(worker)] : []), seconds(worker.last_seen_s), number(worker.restarts)].map(text => element('td', { class: 'n' }, text)),
      element('td', {}, worker.host), element('td', {}, worker.device), element('td', { class: 'n' }, String(worker.pid)),
    ];
    const row = element('tr', {}, ...cells);
    const why = worker.phase === 'lost' ? element('tr', {}, element('td', {}), element('td', { class: 'why', colspan: 11 + hasGpus }, worker.why)) : null;
    return why ? [row, why] : [row];
  }));
  if (!state.workers.length) $('workers').replaceChildren(element('tr', {}, element('td', { colspan: 12 }, 'No worker has joined yet.')));
}

// Parts of a whole, each with a colour.
function stack(parts) {
  const whole = parts.reduce((sum, part) => sum + part.value, 0) || 1;
  return parts.filter(part => part.value > 0).map(part => {
    const piece = element('div', { title: part.title });
    piece.style.width = `${100 * part.value / whole}%`;
    piece.style.background = `var(${part.colour})`;
    return piece;
  });
}

function time(state) {
  const causes = state.goodput.seconds.map((cause, at) => ({ value: cause.seconds, title: CAUSES[cause.cause] ?? cause.cause, colour: `--s${at}` }));
  const whole = causes.reduce((sum, cause) => sum + cause.value, 0) || 1;
  $('stack').replaceChildren(...stack(causes));
  $('causes').replaceChildren(...causes.filter(cause => cause.value >= 0.005).sort((a, b) => b.value - a.value).map(cause => {
    const mark = element('i');
    mark.style.background = `var(${cause.colour})`;
    const share = `${(100 * cause.value / whole).toFixed(1)} %`;
    return element('li', {}, mark, element('span', {}, cause.title), element('b', {}, seconds(cause.value)), element('b', {}, share));
  }));
}

function shards(state) {
  $('sources').replaceChildren(...state.sources.map(source => {
    const pending = Math.max(0, source.shards - source.done - source.leased);
    const parts = [
      { value: source.done, title: `${source.done} done`, colour: '--s0' }, { value: source.leased, title: `${source.leased} being read`, colour: '--s7' },
      { value: pending, title: `${pending} pending`, colour: '--line' },
    ];
    const passed = [['filtered', source.filtered], ['broken', source.bad], ['not finite', source.not_finite]].filter(([, count]) => count);
    const line = element('div', { class: 'stack', role: 'img', 'aria-label': `${source.done} of ${source.shards} shards done` }, ...stack(parts));
    return element('div', { class: 'source' },
      element('p', {}, element('span', {}, `${source.name || 'all shards'}, epoch ${source.epoch}`),
        element('span', {}, `${number(source.done)} done, ${number(source.leased)} being read, ${number(pending)} pending`)),
      line, element('p', { class: 'note' }, [`${number(source.committed)} samples trained`, ...passed.map(([what, count]) => `${number(count)} ${what}`)].join(', ')));
  }));
  const kept = state.checkpoints.toReversed().slice(0, 8).map(one => element('li', {}, clock(one.unix_s), `step ${number(one.step)}`));
  const none = state.checkpoint_step == null ? 'None yet.' : `Newest: step ${number(state.checkpoint_step)}.`;
  $('checkpoints').replaceChildren(...(kept.length ? kept : [element('li', {}, none)]));
}

let newest = '';
function events(state) {
  const key = JSON.stringify(state.events.at(-1)) + state.events.length;
  if (key === newest) return;
  newest = key;
  $('events').replaceChildren(...state.events.toReversed().map(event => {
    const level = event.level === 'info' ? null : element('span', { class: 'level' }, event.level);
    return element('li', { class: event.level }, clock(event.unix_s), level, event.text);
  }));
}

const lists = new Map();
let drawn = '';
async function pictures(state) {
  const steps = state.pictures.slice(-6);
  $('pictures-section').hidden = !steps.length;
  if (!steps.length) return;
  // The newest list grows while its pictures come.
  lists.delete(steps.at(-1));
  for (const step of steps) {
    if (!lists.has(step)) {
      const reply = await fetch(`/pictures/${step}/pictures.json`);
      if (reply.ok) lists.set(step, await reply.json());
    }
  }
  const key = JSON.stringify(steps.map(step => [step, lists.get(step)]));
  if (key === drawn) return;
  drawn = key;
  const prompts = [...new Set(steps.flatMap(step => lists.get(step)?.pictures.map(one => one.prompt) ?? []))];
  // The newest first: a phone shows two or three.
  steps.reverse();
  $('picture-steps').replaceChildren(element('tr', {}, element('td', {}), ...steps.map(step => element('th', { scope: 'col' }, `step ${number(Number(step.slice(5)))}`))));
  $('pictures').replaceChildren(...prompts.map(prompt => element('tr', {}, element('th', { scope: 'row' }, prompt), ...steps.map(step => {
    const one = lists.get(step)?.pictures.find(one => one.prompt === prompt);
    const alt = `${prompt}, drawn at step ${Number(step.slice(5))}`;
    return element('td', {}, one ? element('img', { src: `/pictures/${step}/${one.file}`, alt, loading: 'lazy' }) : null);
  }))));
}

let failures = 0;
let started;
async function turn() {
  try {
    const reply = await fetch(`/api/state/${edition}/${series.step.at(-1) ?? 0}`);
    if (!reply.ok) throw new Error(await reply.text());
    const state = await reply.json();
    failures = 0;
    if (started && started !== state.started_unix_s && !state.series.all) {
      // Another coordinator: its points may be others.
      [edition, started] = [4e9, state.started_unix_s];
      return await turn();
    }
    started = state.started_unix_s;
    take(state.series);
    summary(state);
    failure(state);
    workers(state);
    curves(state);
    time(state);
    shards(state);
    events(state);
    await pictures(state);
  } catch (error) {
    failures += 1;
    // One miss is nothing: a stopped job or a lost network says so.
    if (failures > 1) $('state').textContent = 'The coordinator does not answer: what you see is the last it said.';
    if (!(error instanceof TypeError)) console.error(error);
  }
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => Object.values(charts ?? {}).forEach(chart => chart.draw()));
document.addEventListener('visibilitychange', () => document.hidden || turn());
(async () => {
  for (;;) {
    if (!document.hidden) await turn();
    await new Promise(done => setTimeout(done, 1000));
  }
})();
