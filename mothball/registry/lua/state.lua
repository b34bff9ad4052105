-- include: census
-- The states of a workspace, and when the sweeps have to look at it again. Needs common.lua before it.
--
--   ws:due:evict   ZSET   by the first ms at which a sweep could evict, purge or announce that
--   ws:due:stop    ZSET   by the first ms at which a sweep could stop, strand, abandon or announce that
--   presence:<id>  ZSET   who works in the workspace, by the end (ms) of what each said last; gone with the record
--
-- From a state to those it may go to; the burial of a record, and its way back to `stopped`, are not moves. mothball/policy.py
-- has the same table, and a test compares them.
local MOVES = {
  active = {submitted = true, stopped = true, stranded = true},
  submitted = {active = true, merged = true},
  merged = {},
  stopped = {active = true},
  stranded = {active = true, abandoned = true},
  abandoned = {},
}
local EVICTABLE = {active = true, merged = true, stopped = true, abandoned = true}

-- Something changed that may bring a sweep's work forward: both sweeps look at this workspace next time. A score is never the one that
-- stood there: a sweep that decided before this change must not be able to put the workspace off.
local function mark_kind(kind, id)
  local due = key('ws', 'due', kind)
  local score = tonumber(redis.call('ZSCORE', due, id) or '')
  redis.call('ZADD', due, int(score and score <= NOW and score - 1 or NOW), id)
end

local function mark_due(id)
  mark_kind('evict', id)
  mark_kind('stop', id)
end

-- as_seen(record, n, last): is the record still as the caller saw it? From argument n on, to `last` or the end: fields and values in
-- turn, '' for a missing field. Returns true or false, and until when (ms) the caller saw somebody present: `@present`, 0 never.
local function as_seen(record, n, last)
  local names, wanted, till = {}, {}, 0
  for at = n + 5, last and last + 5 or #ARGV, 2 do
    if ARGV[at] == '@present' then
      till = tonumber(ARGV[at + 1]) or 0
    else
      names[#names + 1] = ARGV[at]
      wanted[#wanted + 1] = ARGV[at + 1]
    end
  end
  local values = #names > 0 and redis.call('HMGET', record, unpack(names)) or {}
  for at = 1, #names do
    if (values[at] or '') ~= wanted[at] then
      return false, till
    end
  end
  return true, till
end

-- The job that works on the workspace under a live lease, unless it is `own`; nil when there is none.
local function holder_of(id, own)
  local job = redis.call('HGET', key('lease', id), 'job')
  if job and job ~= own then
    return job
  end
  return nil
end

-- present(id, seen): is somebody present, for longer than was seen? Who was seen and did not prevent the decision, because its policy
-- limits presence, prevents nothing here.
local function present(id, seen)
  return redis.call('ZCOUNT', key('presence', id), '(' .. int(math.max(NOW, seen)), '+inf') > 0
end

-- Is a job queued for the workspace? One that is waiting for its lease, its host or the time of a retry is, too, unless the host was
-- not heard for so long that nobody can count on it: its workspaces would else be kept for ever.
local HOST_GONE_MS = 3600000
local function job_queued(id)
  local host = redis.call('HGET', key('ws', id), 'host') or ''
  local heard = tonumber(redis.call('ZSCORE', key('hosts', 'offline'), host) or '')
  if heard and NOW - heard > HOST_GONE_MS then
    return false
  end
  for _, job in ipairs(redis.call('ZRANGE', key('jobs', 'ws', id), 0, -1)) do
    if redis.call('HGET', key('job', job), 'state') == 'queued' then
      return true
    end
  end
  return false
end

local function held(record)
  return (redis.call('HGET', record, 'holds') or '[]') ~= '[]'
end

-- move(id, to, reason): true, or nil and the state from which there is no such way. A state that nobody knows allows nothing (Q-02).
local function move(id, to, reason)
  local record = key('ws', id)
  local from = redis.call('HGET', record, 'state') or 'active'
  if not (MOVES[from] and MOVES[from][to]) then
    return nil, from
  end
  redis.call('HSET', record, 'state', to, 'state_since', int(NOW), 'state_reason', reason)
  redis.call('HDEL', record, 'noticed')
  census(id, from, to)
  mark_due(id)
  return true, from
end

-- Back to work: who was missed before is not missed again. Returns nil, or the job that must end first because it is ending the workspace.
local function come_back(id, reason)
  local job = holder_of(id, '')
  local task = job and redis.call('HGET', key('job', job), 'task')
  if task == 'workspace.stop' or task == 'workspace.purge' then
    return job
  end
  local record = key('ws', id)
  local v = redis.call('HMGET', record, 'state', 'runtime')
  -- A stopped process never runs again under its number: kept, its handle would have the workspace stopped again as lost. A unit or
  -- a container may be started again under its name.
  if v[1] == 'stopped' and string.find(v[2] or '', '"driver":"process"', 1, true) then
    redis.call('HDEL', record, 'runtime')
  end
  move(id, 'active', reason)
  local active = int(math.max(NOW, tonumber(redis.call('HGET', record, 'last_active') or '0')))
  redis.call('HSET', record, 'last_active', active, 'last_signal', 'resume', 'sig:resume', active)
  redis.call('ZADD', key('ws', 'by', 'active'), active, id)
  redis.call('ZREMRANGEBYSCORE', key('presence', id), '-inf', int(NOW))
  return nil
end
