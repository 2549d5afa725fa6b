"""vLLM: in a process of its own on this machine, or as servers elsewhere. Only this folder imports vllm."""
