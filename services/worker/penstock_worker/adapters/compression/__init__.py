"""Making versions smaller and faster: a pipeline of steps, or a search over pipelines, in one job.

`job.run` is the entry point. A `Subject` is what is compressed: a module that can be trained, for versions of
our recipes, or a graph whose weights alone can be changed. Each step (`steps/`) takes a subject and changes
it; `pipeline` runs them with a checkpoint after each; `export` writes bundles; `trial` measures one beside
its source; `search` tries pipelines and finds the Pareto front.
"""
