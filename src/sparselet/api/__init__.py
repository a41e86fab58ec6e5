"""The verbs of sparselet as functions: what a notebook calls and the command line wraps.

`import sparselet as sl` offers all of them as `sl.train`, `sl.merge`, … and loads a module when its verb is first used.
"""
