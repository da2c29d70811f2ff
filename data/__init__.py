"""Files on disk, and scores against gold answers. The lowest floor: imports nothing of ours from above."""

from data.objects.moved import find_moved_modules

find_moved_modules()
