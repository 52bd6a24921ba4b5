// Builds the pages: `node build.mjs` writes ../neuron_explainer/viewer/dist; `--check` compares instead and
// fails on any byte that differs; `--watch` builds again whenever a source changes.
//
// app.js, app.css and index.html are the pages that the server hands out; chunk.js is what app.js shares with
// more.js, the pages that are loaded when they are first opened. embed.js and embed.css are the
// feature card alone, for exported files and notebooks: a classic script, because modules do not load from
// file://, that sets the global `neuronExplainer`.
import { createHash } from 'node:crypto';
import { mkdir, readFile, readdir, rm, watch, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';
import { build } from 'esbuild';

const here = dirname(fileURLToPath(import.meta.url));
const dist = join(here, '../neuron_explainer/viewer/dist');
const shipped = ['preact', '@preact/signals', '@preact/signals-core'];

const common = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  write: false,
  charset: 'utf8',
  legalComments: 'none',
  jsx: 'automatic',
  jsxImportSource: 'preact',
  target: ['chrome123', 'firefox121', 'safari17.5'], // light-dark() in CSS
  logLevel: 'warning',
};

async function bundles() {
  const app = { ...common, entryPoints: { app: 'src/main.jsx' }, format: 'esm', splitting: true, chunkNames: '[name]' };
  const embed = { ...common, entryPoints: { embed: 'src/embed.jsx' }, format: 'iife', globalName: 'neuronExplainer' };
  const css = { ...common, entryPoints: { app: 'src/styles/app.css', embed: 'src/styles/embed.css' } };
  const built = await Promise.all([app, embed, css].map((options) => build({ ...options, outdir: 'out' })));
  const files = new Map();
  for (const { outputFiles } of built)
    for (const file of outputFiles) {
      const name = file.path.slice(join(here, 'out').length + 1);
      if (files.has(name)) throw new Error(`two files are called ${name}: only one part can be loaded later`);
      files.set(name, file.text);
    }
  return files;
}

async function licences() {
  const parts = [];
  for (const name of shipped) {
    const folder = join(here, 'node_modules', name);
    const { version, license } = JSON.parse(await readFile(join(folder, 'package.json'), 'utf8'));
    const text = await readFile(join(folder, 'LICENSE'), 'utf8');
    parts.push(`${name} ${version} (${license})\n\n${text.trim()}\n`);
  }
  return parts.join(`\n${'-'.repeat(78)}\n\n`);
}

async function all() {
  const files = await bundles();
  files.set('index.html', await readFile(join(here, 'src/index.html'), 'utf8'));
  // A version in all addresses, so that a browser keeps no old part with a new page.
  const hash = createHash('sha256');
  for (const name of [...files.keys()].sort()) hash.update(files.get(name));
  const version = hash.digest('hex').slice(0, 12);
  for (const name of ['index.html', 'app.js', 'chunk.js', 'more.js'])
    files.set(name, files.get(name).replace(/"((?:\.\/)?(?:app|chunk|more)\.(?:js|css))"/g, `"$1?v=${version}"`));
  files.set('THIRD_PARTY_LICENSES.txt', await licences());
  return files;
}

async function write() {
  const files = await all();
  await rm(dist, { recursive: true, force: true });
  await mkdir(dist, { recursive: true });
  for (const [name, text] of files) await writeFile(join(dist, name), text);
  const kilo = (bytes) => (bytes / 1000).toFixed(1).padStart(6);
  for (const [name, text] of files)
    console.log(`${name.padEnd(22)}${kilo(Buffer.byteLength(text))} kB ${kilo(gzipSync(text).length)} kB gz`);
}

async function check() {
  const files = await all();
  const found = await readdir(dist).catch(() => []);
  const wrong = found.filter((name) => !files.has(name));
  for (const [name, text] of files)
    if ((await readFile(join(dist, name), 'utf8').catch(() => null)) !== text) wrong.push(name);
  if (wrong.length) {
    console.error(`dist differs from what the sources give: ${wrong.join(', ')}; run npm run build in viewer/`);
    process.exit(1);
  }
  console.log(`dist is what the sources give: ${[...files.keys()].join(', ')}`);
}

if (process.argv.includes('--check')) await check();
else await write();
if (process.argv.includes('--watch'))
  for await (const _ of watch(join(here, 'src'), { recursive: true })) await write().catch((e) => console.error(String(e)));
