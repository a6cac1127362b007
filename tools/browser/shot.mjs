// Opens a workflow in ComfyUI's own frontend and saves what it makes of it. Driven by tools/frontend.py.
//   node shot.mjs '{"url": ..., "browser": ..., "workflow": ..., "screenshot": ..., "ui": ..., "api": ..., "run": ...}'
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { chromium } from 'playwright-core';

const START_MS = 180_000;
const SETTLE_MS = 1500;
const PICTURE_NODES = ['LoadImage', 'SaveImage', 'PreviewImage'];
const PICTURE_SIZE = [320, 360];
const options = JSON.parse(process.argv[2]);

function writeJson(file, value) {
  fs.writeFileSync(`${file}.part`, JSON.stringify(value, null, 2) + '\n');
  fs.renameSync(`${file}.part`, file);
}

async function openFrontend(context, url) {
  const page = context.pages()[0] ?? (await context.newPage());
  page.on('pageerror', (error) => console.error(`page error: ${error.message}`));
  // The picture must not depend on what the internet answers.
  const local = (host) => host === '127.0.0.1' || host === 'localhost';
  await context.route((to) => to.protocol.startsWith('http') && !local(to.hostname), (route) => route.abort());
  await page.goto(url, { waitUntil: 'domcontentloaded', timeout: START_MS });
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph, null, { timeout: START_MS });
  await page.waitForTimeout(SETTLE_MS);
  return page;
}

async function loadWorkflow(page, workflow) {
  await page.evaluate(async ([workflow, pictureNodes, pictureSize]) => {
    const isUiFormat = Array.isArray(workflow.nodes);
    if (isUiFormat) return window.app.loadGraphData(workflow, true, true, 'workflow');
    await window.app.loadApiJson(workflow, 'workflow');
    for (const node of window.app.graph.nodes) {
      // Titles do not survive loadApiJson in every version; seeds come out as "randomize".
      const title = workflow[node.id]?._meta?.title;
      if (title) node.title = title;
      for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
      if (pictureNodes.includes(node.comfyClass)) node.setSize(pictureSize); // room for the picture itself
    }
    window.app.graph.arrange(80);
  }, [workflow, PICTURE_NODES, PICTURE_SIZE]);
  await page.waitForTimeout(SETTLE_MS);
  const unknown = await page.evaluate(() => window.app.graph.nodes.filter((node) => !node.comfyClass).map((node) => node.type));
  if (unknown.length) throw new Error(`the frontend does not know: ${unknown.join(', ')}`);
}

function runWorkflow(page, timeoutMs) {
  return page.evaluate((timeoutMs) => new Promise((resolve, reject) => {
    const { api } = window.app;
    api.addEventListener('execution_success', () => resolve());
    api.addEventListener('execution_error', ({ detail }) => reject(new Error(`${detail.node_type}: ${detail.exception_message}`)));
    setTimeout(() => reject(new Error(`not finished after ${timeoutMs / 1000} s`)), timeoutMs);
    window.app.queuePrompt(0, 1);
  }), timeoutMs);
}

async function main() {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'diffportrait3d-browser-'));
  let context;
  try {
    context = await chromium.launchPersistentContext(profile, {
      executablePath: options.browser,
      headless: true,
      viewport: { width: options.width ?? 1600, height: options.height ?? 900 },
      args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
        '--disable-component-update', '--disable-sync', '--disable-extensions', '--no-first-run'],
    });
    const page = await openFrontend(context, options.url);
    await loadWorkflow(page, JSON.parse(fs.readFileSync(options.workflow, 'utf8')));
    if (options.ui) writeJson(options.ui, await page.evaluate(() => window.app.graph.serialize()));
    if (options.api) writeJson(options.api, (await page.evaluate(() => window.app.graphToPrompt())).output);
    if (options.run) await runWorkflow(page, options.run * 1000);
    if (options.screenshot) {
      await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView'));
      await page.waitForTimeout(SETTLE_MS);
      await page.screenshot({ path: options.screenshot });
    }
  } finally {
    await context?.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

main().catch((error) => {
  console.error(`Error: ${error.message}`);
  process.exit(1);
});
