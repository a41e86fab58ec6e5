"""Many experts of one base model behind one engine: each request names an expert, or several that are merged for it.

The engine (`engine`) and the registry (`registry`) work without HTTP; `app` and the modules that it imports need the extra
`serve`.
"""
