"""Paddler: an LLM load balancer and serving platform for llama.cpp."""

__version__ = "0.1.0"
