"""Orders, behind the gateway."""

from fastapi import FastAPI

from app.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application over `settings` (the environment's by default)."""
    settings = settings or get_settings()
    app = FastAPI(title="Orders", redirect_slashes=False)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this process turns."""
        return {"status": "healthy"}

    return app
