"""Serving a model: requests that run together on all ranks, asked for in the way of OpenAI."""

from narrowcast.serving.job import Job
from narrowcast.serving.ranks import Serving, serve, served

__all__ = ["Job", "Serving", "serve", "served"]
