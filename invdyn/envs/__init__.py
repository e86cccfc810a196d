"""Gymnasium tasks whose steps can be inverted, the exact inverse, replay, and recording.

Importing this package registers the tasks with Gymnasium.
"""

from invdyn.envs.registration import register

register()
