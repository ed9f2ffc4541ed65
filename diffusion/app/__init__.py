"""The program ``unfactor``, and the folder that its stages keep their results in."""
