-- include: common
-- include: state
-- Repair the indexes, a batch at a time: what the scripts keep together may have come apart when Redis lost its last writes.
--
-- ARGV  1 'records' | 'zset' | 'set'   2 of records: '1' the sweeps look at each of them again, '' only at those they had lost;
--       else the index, without the namespace   3... ids
-- Returns how many entries were added (records) or dropped (an index)
-- Records and index entries that are younger than a minute are not repaired: whoever makes them may still be at it.
local kind, what = arg(1), arg(2)
local edge = NOW - 60000
local changed = 0

local function add_score(index, score, id)
  if not redis.call('ZSCORE', index, id) then
    redis.call('ZADD', index, score, id)
    changed = changed + 1
  end
end

local function add_member(index, id)
  changed = changed + redis.call('SADD', index, id)
end

local function heal_record(id)
  local v = redis.call('HMGET', key('ws', id), 'host', 'repo', 'created_at', 'last_active', 'expires_at', 'digest',
    'last_good_at', 'state')
  local host, repo, digest, state = v[1], v[2] or '', v[6] or '', v[8] or 'active'
  for n = 3, 7 do
    -- A record that somebody damaged is left as it is: the sweeps keep it and say so, and the others are repaired.
    if n ~= 6 and (v[n] or '') ~= '' and not tonumber(v[n]) then
      return
    end
  end
  if not host then
    return
  elseif tonumber(v[3] or '0') > edge then
    if what == '1' then
      mark_due(id)
    end
    return
  end
  add_score(key('ws', 'by', 'created'), v[3] or '0', id)
  add_score(key('ws', 'by', 'active'), v[4] or '0', id)
  if (v[5] or '') ~= '' then
    add_score(key('ws', 'by', 'deadline'), v[5], id)
  end
  add_member(key('ws', 'host', host), id)
  if repo ~= '' then
    add_member(key('ws', 'repo', repo), id)
    if digest ~= '' then
      add_score(key('ws', 'good', host, repo), (v[7] or '') ~= '' and v[7] or '0', id)
    end
  end
  if state ~= 'active' then
    add_member(key('ws', 'state', state), id)
  end
  -- No score is lawful too (a hold, a pin, a policy that never stops): looking once more costs little, never looking again would
  -- keep it for ever.
  for _, kind in ipairs({'evict', 'stop'}) do
    if what == '1' or not redis.call('ZSCORE', key('ws', 'due', kind), id) then
      mark_kind(kind, id)
    end
  end
end

local function belongs(id)
  local v = redis.call('HMGET', key('ws', id), 'host', 'repo', 'state')
  local host, repo = v[1], v[2] or ''
  if not host then
    return false
  end
  local family = string.match(what, '^ws:(%a+):')
  if family == 'host' then
    return what == 'ws:host:' .. host
  elseif family == 'repo' then
    return what == 'ws:repo:' .. repo
  elseif family == 'state' then
    return what == 'ws:state:' .. (v[3] or 'active')
  elseif family == 'good' then
    return what == 'ws:good:' .. host .. ':' .. repo
  end
  return true
end

for n = 8, #ARGV do
  local id = ARGV[n]
  if kind == 'records' then
    heal_record(id)
  elseif not belongs(id) then
    local index = NS .. ':' .. what
    if kind == 'set' then
      changed = changed + redis.call('SREM', index, id)
    elseif string.match(what, '^ws:by:') == nil or tonumber(redis.call('ZSCORE', index, id) or '0') <= edge then
      changed = changed + redis.call('ZREM', index, id)
    end
  end
end
return changed
