"""What lies on disk, and how it is judged by gold. The lowest floor: imports nothing of ours from above."""

from data.moved import find_moved_modules

find_moved_modules()
