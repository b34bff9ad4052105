-- include: common
-- include: job
-- A running job gives back what was promised to it. The end of a run does so by itself; this is for one that goes on without.
--
-- ARGV  1 job   2 fence
-- Returns {'ok'} | {'lost'}
if run_of(arg(1), arg(2)) ~= 'run' then
  return {'lost'}
end
budget_refund(arg(1))
return {'ok'}
