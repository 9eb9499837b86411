"""What a run says about itself: the live line, the loss curve and the bill at the end."""
