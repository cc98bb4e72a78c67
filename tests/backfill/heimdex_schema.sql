-- The schema that the users of this project live in, as on Supabase: pgvector in the schema `extensions`, tables that a
-- role without superuser owns, row level security, and a search function that filters by owner after the index.
-- A superuser runs it once in an empty database. `app` owns the tables; `service` reads and updates all rows;
-- `reader` sees only the rows of the owner that `app.owner_id` names, and has no UPDATE policy.
CREATE SCHEMA IF NOT EXISTS extensions;
CREATE EXTENSION IF NOT EXISTS vector SCHEMA extensions;
DO $$
DECLARE name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['app', 'service', 'reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', name);
        END IF;
        EXECUTE format('GRANT USAGE ON SCHEMA extensions TO %I', name);
    END LOOP;
END $$;
GRANT USAGE, CREATE ON SCHEMA public TO app;
GRANT USAGE ON SCHEMA public TO service, reader;
SET ROLE app;

CREATE TABLE videos (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    owner_id uuid NOT NULL,
    title text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE video_scenes (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    video_id uuid NOT NULL REFERENCES videos (id) ON DELETE CASCADE,
    index int NOT NULL DEFAULT 0,
    start_s float8 NOT NULL DEFAULT 0,
    end_s float8 NOT NULL DEFAULT 1,
    duration_s float8 GENERATED ALWAYS AS (end_s - start_s) STORED,
    transcript text,
    thumbnail_url text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK (end_s >= start_s)
);
CREATE INDEX video_scenes_video_id ON video_scenes (video_id);

-- The first of the two migrations: the column, its metadata and its index.
ALTER TABLE video_scenes
    ADD COLUMN embedding_visual_clip extensions.vector(512),
    ADD COLUMN visual_clip_metadata jsonb;
CREATE INDEX idx_video_scenes_embedding_visual_clip ON video_scenes
    USING hnsw (embedding_visual_clip extensions.vector_cosine_ops) WITH (m = 16, ef_construction = 64);

-- The second one: the search.
CREATE FUNCTION search_scenes_by_visual_clip_embedding(
    query_embedding extensions.vector(512), match_threshold float8 DEFAULT 0.2, match_count int DEFAULT 10,
    filter_video_id uuid DEFAULT NULL, filter_user_id uuid DEFAULT NULL)
RETURNS TABLE (id uuid, video_id uuid, index int, thumbnail_url text, similarity float8)
LANGUAGE sql STABLE SET search_path = public, extensions AS $$
    SELECT s.id, s.video_id, s.index, s.thumbnail_url, 1 - (s.embedding_visual_clip <=> query_embedding)
    FROM video_scenes AS s JOIN videos AS v ON v.id = s.video_id
    WHERE s.embedding_visual_clip IS NOT NULL
        AND (filter_video_id IS NULL OR s.video_id = filter_video_id)
        AND (filter_user_id IS NULL OR v.owner_id = filter_user_id)
        AND 1 - (s.embedding_visual_clip <=> query_embedding) > match_threshold
    ORDER BY s.embedding_visual_clip <=> query_embedding
    LIMIT match_count
$$;

ALTER TABLE videos ENABLE ROW LEVEL SECURITY;
ALTER TABLE video_scenes ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_videos ON videos FOR SELECT TO reader
    USING (owner_id::text = current_setting('app.owner_id', true));
CREATE POLICY own_scenes ON video_scenes FOR SELECT TO reader
    USING (EXISTS (SELECT FROM videos AS v WHERE v.id = video_id));
CREATE POLICY all_videos ON videos TO service USING (true) WITH CHECK (true);
CREATE POLICY all_scenes ON video_scenes TO service USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON videos, video_scenes TO service;
GRANT SELECT ON videos, video_scenes TO reader;
RESET ROLE;
