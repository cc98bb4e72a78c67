"""Where RunPod's hub looks for a handler; the image starts the module itself, see Dockerfile."""

from heimdex_clip_worker.handler import main

if __name__ == "__main__":
    main()
