"""The process of a vLLM server that VLLMRemote starts: vLLM's own API server, which ends with its parent.

Run as ``python -m dppo_lightning.rollout.vllm_launcher PIPE PARENT``. The one message that it is sent is "start", with
the settings of vLLM's EngineArgs and further arguments; after that it answers by HTTP only.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from dppo_lightning.rollout.child_process import ParentLink
from dppo_lightning.rollout.vllm_worker import cpu_settings

SERVER = "vllm.entrypoints.openai.api_server"


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of vLLM's command line; None leaves vLLM's default."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def main() -> None:
    """Serve until the parent closes the pipe."""
    pipe, parent = map(int, sys.argv[1:])
    link = ParentLink(pipe, parent)
    _, settings = link.receive(wait=True) or ("", {})
    try:
        gc.disable()  # collecting while a million objects are imported takes a quarter of the time to start
        from vllm.platforms import current_platform

        gc.freeze()
        gc.enable()
        if current_platform.is_cpu():
            settings = settings | cpu_settings(settings)
        sys.argv = [SERVER, *command_line(settings)]
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        print(f"the server left with {error.code}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
