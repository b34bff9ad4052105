-- Which workspaces are in which state, so that nobody counts by looking at each (D-14). Needs common.lua before it.
--
--   ws:state:<state>   SET   the workspaces in a state other than `active`; a registered one that is in none of these is active

-- census(ws, from, to): call in every script that changes a record's state; '' stands for no record (evicted, released; brought back).
local function census(ws, from, to)
  if from ~= to then
    if from ~= '' and from ~= 'active' then
      redis.call('SREM', key('ws', 'state', from), ws)
    end
    if to ~= '' and to ~= 'active' then
      redis.call('SADD', key('ws', 'state', to), ws)
    end
  end
end
