"""Door three: an HTTP service that the real `tinker` SDK talks to (`agl serve`), over any `LoraEngine`.

Requests enter, futures leave at once, results when they are polled for. What was acknowledged is on the disk first, so that the
service can be killed at any instant: started again, it restores each model and goes on, and its clients notice nothing.

```
app (auth, limits, log) -> routes -> service -> journal (SQLite + payload files)      acknowledged from here on
                                        |
                                      queue -> runner (the one engine thread) -> LoraEngine
                                                  |  models.py: restore, replay, save behind the operations
                                        sweeper: TTLs, what nobody needs any more
```
"""
