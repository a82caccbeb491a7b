"""An examination before several machines work together: each rank, the ways between them, and the problems."""

from narrowcast.preflight.examination import Report, examined
from narrowcast.preflight.problems import Problem, problems
from narrowcast.preflight.roll import Roll

__all__ = ["Problem", "Report", "Roll", "examined", "problems"]
