"""Serving a model: requests that run together on all ranks, asked for in the way of OpenAI."""

from narrowcast.serving.job import Job
from narrowcast.serving.ranks import GRACE_S, Ending, Serving, serve, served

__all__ = ["GRACE_S", "Ending", "Job", "Serving", "serve", "served"]
