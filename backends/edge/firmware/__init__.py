"""The example firmware of a folder of C: its files, how they are built, and how they run on an emulated processor."""
