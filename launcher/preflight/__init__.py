"""What could stop a run, looked for on all hosts at once before anything is computed; all of it is told at once.

Facts (`records`) are collected on each host (`facts`, `folder`), and pure functions judge those of all hosts
(`checks`). There are two ways to the facts:

* `ranks`: inside a run, right after its world has opened, by the ranks themselves;
* `command`: `python -m launcher preflight`, over ssh or srun (`hosts`, `probe`), before any world is tried.
"""
