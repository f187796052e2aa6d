// Pictures of the live page at desktop and phone width, light and dark, by a headless Chromium through its debugging protocol.
// Needs node 20.10 or newer and `chromium`, nothing else. (Before node 22 its WebSocket is behind a flag.)
//
//     node --experimental-websocket tests/web/screenshots.mjs http://127.0.0.1:7734/ OUT
//
// Fails if the page logs an error, scrolls sideways, shows no curve, or has a number that its tile does not hold.

import { spawn } from 'node:child_process';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const [address, out] = process.argv.slice(2);
if (!address || !out) {
  console.error('usage: node screenshots.mjs ADDRESS FOLDER');
  process.exit(2);
}
const SIZES = { desktop: { width: 1360, height: 900, mobile: false }, phone: { width: 390, height: 844, mobile: true } };

const profile = await mkdtemp(join(tmpdir(), 'peapod-page-'));
const browser = spawn(process.env.CHROMIUM ?? 'chromium', [
  '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-port=0', `--user-data-dir=${profile}`, 'about:blank',
], { stdio: ['ignore', 'ignore', 'pipe'] });
const endpoint = await new Promise((found, failed) => {
  let said = '';
  browser.on('error', failed);
  browser.on('exit', code => failed(new Error(`chromium ended with ${code}: ${said}`)));
  browser.stderr.on('data', bytes => {
    said += bytes;
    const match = said.match(/DevTools listening on (ws:\S+)/);
    if (match) found(match[1]);
  });
});

// One page, spoken to by numbered calls.
const port = new URL(endpoint).port;
const page = await (await fetch(`http://127.0.0.1:${port}/json/new?about:blank`, { method: 'PUT' })).json();
const socket = new WebSocket(page.webSocketDebuggerUrl);
await new Promise(open => socket.addEventListener('open', open));
const waiting = new Map();
const problems = [];
let calls = 0;
socket.addEventListener('message', ({ data }) => {
  const said = JSON.parse(data);
  if (said.id) {
    waiting.get(said.id)(said.result ?? said.error);
    waiting.delete(said.id);
  } else if (said.method === 'Runtime.exceptionThrown') {
    problems.push(said.params.exceptionDetails.exception?.description ?? said.params.exceptionDetails.text);
  } else if (said.method === 'Log.entryAdded' && said.params.entry.level === 'error') {
    problems.push(`${said.params.entry.text} ${said.params.entry.url ?? ''}`);
  }
});
const call = (method, params = {}) => new Promise(done => {
  waiting.set(++calls, done);
  socket.send(JSON.stringify({ id: calls, method, params }));
});
const evaluate = async expression => (await call('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true })).result?.value;

try {
  await mkdir(out, { recursive: true });
  for (const domain of ['Page', 'Runtime', 'Log']) await call(`${domain}.enable`);
  for (const [size, metrics] of Object.entries(SIZES)) {
    for (const scheme of ['light', 'dark']) {
      await call('Emulation.setDeviceMetricsOverride', { ...metrics, deviceScaleFactor: 1 });
      await call('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: scheme }] });
      await call('Page.navigate', { url: address });
      const deadline = Date.now() + 20_000;
      while (Date.now() < deadline && !(await evaluate("document.querySelectorAll('.chart canvas').length === 8 && document.querySelector('#workers tr') !== null"))) {
        await new Promise(done => setTimeout(done, 200));
      }
      // Pictures come a moment after the rest.
      await new Promise(done => setTimeout(done, 2500));
      const charts = await evaluate("document.querySelectorAll('.chart canvas').length");
      if (charts !== 8) problems.push(`${size} ${scheme}: ${charts} charts instead of 8`);
      const wide = await evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth');
      if (wide > 0) problems.push(`${size} ${scheme}: the page is ${wide} pixels wider than its window`);
      // The numbers of a long job fit, too. The next turn of the page puts its own there again.
      const cut = await evaluate(`(() => {
        document.getElementById('t-step').innerHTML = '1,234,567 <small>of 2,000,000</small>';
        return [...document.querySelectorAll('.tiles dd')].filter(dd => dd.scrollWidth > dd.clientWidth).map(dd => dd.id).join(', ');
      })()`);
      if (cut) problems.push(`${size} ${scheme}: wider than their tiles: ${cut}`);
      const { cssContentSize } = await call('Page.getLayoutMetrics');
      const clip = { x: 0, y: 0, width: metrics.width, height: cssContentSize.height, scale: 1 };
      const { data } = await call('Page.captureScreenshot', { format: 'png', captureBeyondViewport: true, clip });
      await writeFile(join(out, `${size}-${scheme}.png`), Buffer.from(data, 'base64'));
    }
  }
} finally {
  socket.close();
  const ended = new Promise(done => browser.once('exit', done));
  browser.removeAllListeners('exit');
  browser.on('exit', () => {});
  browser.kill();
  await Promise.race([ended, new Promise(done => setTimeout(done, 5000))]);
  await rm(profile, { recursive: true, force: true, maxRetries: 5 });
}
problems.forEach(problem => console.error(problem));
process.exit(problems.length ? 1 : 0);
