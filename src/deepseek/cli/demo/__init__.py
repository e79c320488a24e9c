"""The main job, start to end: a list of steps, each a function from the demo's state to a section."""
