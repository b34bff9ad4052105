-- include: common
-- include: job
-- Record a job, or join the one that is queued in the same lane (Q-30, Q-31): per workspace, without one per queue.
--
-- ARGV  1 job   2 task   3 arguments, JSON   4 the same in parts, JSON ('' without lane, see below)
--       5 workspace ('' none)   6 lane ('' none)   7 host ('' the workspace's)   8 queue ('' the host's, or control)
--       9 origin   10 most bytes of arguments
-- Returns {'ok', 'created' | 'joined' | 'known', HGETALL of the job, 1 when the caller has to ring its doorbell, else 0}
--       | {'gone', reason} | {'not_found', ''} | {'host_offline', host}
--       | {'other_host', host of the workspace} | {'mismatch', HGETALL of the job}
--
-- Parts: [[name, class, value], ...] sorted by name, name and value being JSON text that is never decoded here. Class:
--   b boolean: OR      i integer: the larger      o anything else: the later
--   l list of JSON texts, sorted, none twice: union      n null: says nothing, the other value stands
-- `options` are not joined: {} says nothing like null, and requests whose options differ stay jobs of their own.
-- A key of a higher class wins over a lower one, so joining is associative and idempotent whatever is mixed.
local id, task, args, parts = arg(1), arg(2), arg(3), arg(4)
local ws, lane, host, queue, origin, max_bytes = arg(5), arg(6), arg(7), arg(8), arg(9), tonumber(arg(10))
local RANK = {n = 0, b = 1, i = 2, o = 3, l = 4}
local OPTIONS = '"options"'

-- Must the doorbell of a queued job be rung again because somebody asks for it? Not when it was rung a moment ago, and not
-- when it waits: for a lease that hands over, for the time of its retry, or for a host that is rung when it comes back.
local function ring_again(job)
  local v = redis.call('HMGET', key('job', job), 'state', 'waiting', 'due_at', 'rung_at', 'queue')
  local away = host_of(v[5])
  if v[1] ~= 'queued' or v[2] == '1' or v[3] ~= '0' or NOW - tonumber(v[4] or '0') < RING_AFTER
      or (away and redis.call('ZSCORE', key('hosts', 'offline'), away)) then
    return 0
  end
  redis.call('HSET', key('job', job), 'rung_at', int(NOW))
  local ring = key('jobs', 'ring')
  if tonumber(redis.call('ZSCORE', ring, job) or '0') < NOW + RING_AFTER then
    redis.call('ZADD', ring, int(NOW + RING_AFTER), job)
  end
  return 1
end

local known = redis.call('HMGET', key('job', id), 'task', 'workspace')
if known[1] then
  local same = known[1] == task and known[2] == ws
  if same then
    return {'ok', 'known', redis.call('HGETALL', key('job', id)), ring_again(id)}
  end
  return {'mismatch', redis.call('HGETALL', key('job', id))}
end

if ws ~= '' then
  local code, reason = workspace_error(ws)
  if code then
    return {code, reason}
  end
  local home = redis.call('HGET', key('ws', ws), 'host')
  if host ~= '' and host ~= home then
    return {'other_host', home}
  end
  host = home
end
if queue == '' then
  queue = host == '' and 'control' or 'host.' .. host
end
local owner = host_of(queue)
if owner and redis.call('EXISTS', key('host', owner)) == 0 then
  return {'host_offline', owner}
end

-- Lists are sorted by bytes without the closing quote, as the client sorts them. `<` on Lua texts would follow the
-- server's locale, and two servers would store two orders. Four bytes at a time: this runs for every item of a long list.
local byte = string.byte

local function weight(text, at, code)
  if not code or (code == 34 and at == #text) then
    return -1
  end
  return code
end

local function before(a, b)
  if a == b then
    return false
  end
  for at = 1, math.min(#a, #b) + 1, 4 do
    local a1, a2, a3, a4 = byte(a, at, at + 3)
    local b1, b2, b3, b4 = byte(b, at, at + 3)
    if a1 ~= b1 then
      return weight(a, at, a1) < weight(b, at, b1)
    elseif a2 ~= b2 then
      return weight(a, at + 1, a2) < weight(b, at + 1, b2)
    elseif a3 ~= b3 then
      return weight(a, at + 2, a3) < weight(b, at + 2, b3)
    elseif a4 ~= b4 then
      return weight(a, at + 3, a4) < weight(b, at + 3, b4)
    end
  end
  return false
end

local function union(a, b)
  local out, i, j = {}, 1, 1
  while i <= #a or j <= #b do
    if j > #b or (i <= #a and a[i] ~= b[j] and before(a[i], b[j])) then
      out[#out + 1] = a[i]
      i = i + 1
    else
      if i <= #a and a[i] == b[j] then
        i = i + 1
      end
      out[#out + 1] = b[j]
      j = j + 1
    end
  end
  return out
end

-- Null says nothing, and neither do options that set none: the other request's stand.
local function says(part)
  return part[2] ~= 'n' and not (part[1] == OPTIONS and part[3] == '{}')
end

local function options_of(all)
  for _, part in ipairs(all) do
    if part[1] == OPTIONS and says(part) then
      return part[3]
    end
  end
  return nil
end

-- Options are settings of one run: one job cannot obey two of them.
local function agree(old, new)
  local a, b = options_of(old), options_of(new)
  return not a or not b or a == b
end

local function join(old, new)
  if says(old) ~= says(new) then
    return says(old) and old or new
  elseif RANK[old[2]] ~= RANK[new[2]] then
    return RANK[old[2]] > RANK[new[2]] and old or new
  end
  if old[2] == 'b' then
    return old[3] == 'true' and old or new
  elseif old[2] == 'i' then
    return tonumber(old[3]) > tonumber(new[3]) and old or new
  elseif old[2] == 'l' then
    return {new[1], 'l', union(old[3], new[3])}
  end
  return new
end

local function join_all(old, new)
  local out, i, j = {}, 1, 1
  while i <= #old or j <= #new do
    if j > #new or (i <= #old and before(old[i][1], new[j][1])) then
      out[#out + 1] = old[i]
      i = i + 1
    elseif i > #old or before(new[j][1], old[i][1]) then
      out[#out + 1] = new[j]
      j = j + 1
    else
      out[#out + 1] = join(old[i], new[j])
      i, j = i + 1, j + 1
    end
  end
  return out
end

local function text_of(all)
  local out = {}
  for n, part in ipairs(all) do
    local value = part[3]
    if part[2] == 'l' then
      value = '[' .. table.concat(value, ',') .. ']'
    end
    out[n] = part[1] .. ':' .. value
  end
  return '{' .. table.concat(out, ',') .. '}'
end

local lane_key = ''
if lane ~= '' then
  -- No workspace id begins with ~, so a workspace that is called like a queue never shares its lane.
  lane_key = lane .. ':' .. (ws ~= '' and ws or '~' .. queue)
  local there = redis.call('GET', key('lane', lane_key))
  local v = there and redis.call('HMGET', key('job', there), 'state', 'task', 'parts', 'due_at', 'registration') or {}
  if v[1] == 'queued' and v[2] == task and v[3] and (v[5] or '') == registration(ws) then
    local old, new = cjson.decode(v[3]), cjson.decode(parts)
    local all = join_all(old, new)
    local joined = text_of(all)
    -- A union past the limit would be a job no worker accepts: the newcomer then becomes a job of its own.
    if #joined <= max_bytes and agree(old, new) then
      redis.call('HSET', key('job', there), 'args', joined, 'parts', cjson.encode(all))
      redis.call('HINCRBY', key('job', there), 'joined', 1)
      if v[4] ~= '0' then
        -- It was waiting out a backoff; somebody asks for it now (Q-51).
        requeue(there, NOW)
      end
      count('jobs_joined')
      return {'ok', 'joined', redis.call('HGETALL', key('job', there)), ring_again(there)}
    end
  end
  redis.call('SET', key('lane', lane_key), id)
end

create_job(id, ws, 'task', task, 'args', args, 'host', host, 'queue', queue, 'lane', lane, 'lane_key', lane_key, 'origin', origin)
if lane ~= '' then
  redis.call('HSET', key('job', id), 'parts', parts)
end
event('job.submitted', 'job', id, 'task', task, 'workspace', ws, 'queue', queue, 'origin', origin)
return {'ok', 'created', redis.call('HGETALL', key('job', id)), 1}
