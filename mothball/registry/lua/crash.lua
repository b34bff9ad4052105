-- What the scripts of crash reports share. Needs common.lua before it.
--
--   crash:<id>                     HASH    the record; ids begin with `crash-`, so that none is called like an index
--   crash:by:at                    ZSET    all reports, by time
--   crash:host:<host>, crash:ws:<workspace>, crash:repo:<repo>   ZSET  those of one, by time
--   crash:sig:<signature>:<scope>  STRING, PX  the report on which the same failure is counted
--   crash:gone:<host>:<workspace>  STRING, PX  the last report of a workspace without record was deleted: its layout may go
--   crash:draft:<job>              HASH, PX    evidence of a report that is being made; later only the report's id
local function crash_key(id)
  return key('crash', id)
end

-- How many reports the workspace has, in its record; nothing for one without a record or on another host.
local function crash_note(ws, host)
  local record = key('ws', ws)
  if redis.call('HGET', record, 'host') == host then
    redis.call('HSET', record, 'crash_reports', redis.call('ZCARD', key('crash', 'ws', ws)))
  end
end

local function crash_index(id, ws, repo, host, at)
  redis.call('ZADD', key('crash', 'by', 'at'), at, id)
  redis.call('ZADD', key('crash', 'host', host), at, id)
  redis.call('ZADD', key('crash', 'ws', ws), at, id)
  if repo ~= '' then
    redis.call('ZADD', key('crash', 'repo', repo), at, id)
  end
  crash_note(ws, host)
end

-- The report on which a failure of this signature is counted now; nil when it needs one of its own.
local function crash_same(sig, window)
  local id = window > 0 and redis.call('GET', sig)
  local v = id and redis.call('HMGET', crash_key(id), 'first_at', 'deleting') or {}
  local first = v[1]
  -- One that is being deleted takes nothing any more: what is counted on it would go with it.
  if first and v[2] ~= '1' and NOW - tonumber(first) < window then
    return id
  end
  return nil
end

-- The job has its report: asked again, it is told this one. The evidence has done its work.
local function crash_done(job, id)
  local draft = key('crash', 'draft', job)
  redis.call('HDEL', draft, 'evidence')
  redis.call('HSET', draft, 'report', id, 'at', redis.call('HGET', draft, 'at') or int(NOW))
  redis.call('PEXPIRE', draft, int(math.max(JOB_TTL, 1000)))
end

-- crash_again(id, job, ws, at, occurrence, most): the same failure once more, counted on report `id`; once per job.
local function crash_again(id, job, ws, at, occurrence, most)
  if redis.call('HGET', key('crash', 'draft', job), 'report') == id then
    return
  end
  local record = crash_key(id)
  local v = redis.call('HMGET', record, 'occurrences', 'last_at', 'title', 'host', 'signature')
  local all = cjson.decode((v[1] or '') ~= '' and v[1] or '[]')
  table.insert(all, 1, cjson.decode(occurrence))
  while #all > most do
    table.remove(all)
  end
  redis.call('HINCRBY', record, 'count', 1)
  redis.call('HSET', record, 'occurrences', cjson.encode(all), 'last_at', int(math.max(tonumber(at), tonumber(v[2] or '0'))))
  count('crash_repeats')
  event('workspace.crashed', 'workspace', ws, 'report', id, 'again', '1', 'count', redis.call('HGET', record, 'count'),
    'title', v[3] or '', 'signature', v[5] or '', 'host', v[4] or '', 'job', job)
  crash_done(job, id)
end
