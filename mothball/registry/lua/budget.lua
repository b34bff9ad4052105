-- How many bytes the captures of the fleet take (Q-10). Needs common.lua before it; changed by nothing but these functions.
--
--   budget            HASH  loaded      bytes of the captures of registered workspaces: the sum of their field `budgeted`
--                           reserved    bytes promised to running jobs: the sum of budget:reserved
--                           retained    bytes of captures of evicted and released workspaces that a store still holds
--                           high_water  the most that loaded and reserved have been together
--   budget:reserved   HASH  job -> bytes
--   budget:retained   HASH  '<host> <workspace>' -> bytes
--
-- A record says in `budgeted` how much of its `stored_bytes` is counted, so that nothing counts twice or is taken off uncounted,
-- whichever script comes first and whatever an older version did not write.

-- budget_add(field, by): never below zero.
local function budget_add(field, by)
  if by ~= 0 and redis.call('HINCRBY', key('budget'), field, int(by)) < 0 then
    redis.call('HSET', key('budget'), field, '0')
  end
end

local function budget_committed()
  local v = redis.call('HMGET', key('budget'), 'loaded', 'reserved', 'high_water')
  return tonumber(v[1] or '0') + tonumber(v[2] or '0'), tonumber(v[3] or '0')
end

local function budget_mark()
  local committed, high = budget_committed()
  if committed > high then
    redis.call('HSET', key('budget'), 'high_water', int(committed))
  end
end

-- budget_settle(ws): call when the record's stored_bytes changed; the budget then counts exactly those.
local function budget_settle(ws)
  local v = redis.call('HMGET', key('ws', ws), 'stored_bytes', 'budgeted')
  local stored, counted = tonumber(v[1] or '0'), tonumber(v[2] or '0')
  if stored ~= counted then
    redis.call('HSET', key('ws', ws), 'budgeted', int(stored))
    budget_add('loaded', stored - counted)
    budget_mark()
  end
end

-- budget_bury(ws): call before the record is deleted. Its bytes are retained from here on, until the collector of its host has
-- taken its captures out of the store.
local function budget_bury(ws)
  local v = redis.call('HMGET', key('ws', ws), 'host', 'stored_bytes', 'budgeted')
  local stored = tonumber(v[2] or '0')
  budget_add('loaded', -tonumber(v[3] or '0'))
  if v[1] and stored > 0 then
    redis.call('HINCRBY', key('budget', 'retained'), v[1] .. ' ' .. ws, int(stored))
    budget_add('retained', stored)
  end
end

-- budget_unbury(ws): call after a record was made or brought back (register, undelete), with its field `host`. The captures that its
-- host's store still holds of it count as its own again; its high water mark begins anew (Q-04).
local function budget_unbury(ws)
  local v = redis.call('HMGET', key('ws', ws), 'host', 'bytes', 'stored_bytes')
  local field = v[1] .. ' ' .. ws
  local kept = redis.call('HGET', key('budget', 'retained'), field)
  if kept then
    redis.call('HDEL', key('budget', 'retained'), field)
    budget_add('retained', -tonumber(kept))
  elseif (v[2] or '0') == '0' and (v[3] or '0') == '0' then
    return
  end
  redis.call('HSET', key('ws', ws), 'stored_bytes', kept or '0', 'budgeted', '0', 'high_water_bytes', v[2] or '0')
  budget_settle(ws)
end

-- budget_refund(job): what was promised to the job is free again; a job that ends, fails or goes back to the queue keeps nothing.
local function budget_refund(job)
  local bytes = redis.call('HGET', key('budget', 'reserved'), job)
  if bytes then
    redis.call('HDEL', key('budget', 'reserved'), job)
    budget_add('reserved', -tonumber(bytes))
  end
end
