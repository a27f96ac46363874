// The servers of tests, as processes of Python.

import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

/**
 * Starts `python -m module`, which prints its URL.
 *
 * @param {string} module
 * @returns {Promise<{url: string, stop: () => Promise<unknown>}>}
 */
export async function serve(module) {
  const root = new URL("../../", import.meta.url).pathname;
  const process_ = spawn(process.env["PYTHON"] ?? `${root}.venv/bin/python`, ["-m", module], { cwd: root, stdio: ["pipe", "pipe", "inherit"] });
  const lines = createInterface({ input: process_.stdout });
  const ended = new Promise((resolve) => process_.once("exit", resolve));
  const url = await Promise.race([
    new Promise((resolve) => lines.once("line", resolve)),
    ended.then((status) => { throw new Error(`${module} ended with ${status}`); }),
  ]);
  return { url, stop: () => { process_.stdin.end(); return ended; } };
}
