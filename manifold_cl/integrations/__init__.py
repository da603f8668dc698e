"""Where other people's training loops meet our adapters; each file needs the library that it is named after."""
