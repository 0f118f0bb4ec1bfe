"""Observation -> plan per layer. So far: the scalarisations that turn several objectives into one."""

from mango.policy import scalarize

__all__ = ["scalarize"]
